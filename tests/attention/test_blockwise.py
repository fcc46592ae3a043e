"""Gradients through the attention that observes: those of a plain softmax, and no n x n held."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import kvprune
from kvprune.attention.blockwise import BLOCK
from kvprune.policies import H2O
from kvprune.wiring.attention import slot_attention

from ..support.driver import Driver
from ..support.models import fresh_model, prompt

LONG = 2 * BLOCK + 7
ROWS, HEADS, KV_HEADS = 2, 4, 2


def held_by_autograd(policies: list[kvprune.TokenPolicy], count: int) -> int:
    """Bytes, each storage once, that a prompt's forward leaves for its backward pass."""
    model, storages = kvprune.attach(fresh_model()), {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Kept alive, so that no address is used twice.
        storages[storage.data_ptr()] = storage
        return tensor

    cache = kvprune.ComposedCache(policies)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(prompt(1, count), past_key_values=cache)
    assert out.logits.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def test_what_gradients_hold_grows_with_the_prompt_and_not_with_its_square():
    """Blocks of probabilities are computed once more in the backward pass."""
    sizes = [held_by_autograd([H2O(9, 9)], count) for count in (BLOCK, 5 * BLOCK, 9 * BLOCK)]
    assert sizes[2] - sizes[1] <= 1.01 * (sizes[1] - sizes[0])


def user_mask(kind: str, count: int, seen: int) -> Tensor:
    """`[B, Hq, count, seen]`: causal, with more hidden; "float" adds to the scores too."""
    generator = torch.Generator().manual_seed(2)
    shape = (ROWS, HEADS, count, seen)
    newest = torch.ones(count, seen).tril(seen - count)
    shown = (torch.rand(shape, generator=generator) > 0.2) & newest.bool()
    shown |= (newest - torch.ones(count, seen).tril(seen - count - 1)).bool()
    if kind == "bool":
        return shown
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    return noise.masked_fill(~shown, torch.finfo(torch.float64).min)


def plain_softmax(
    states: list[Tensor],
    columns: Tensor,
    new: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """`[B, Q, Hq, D]` of q `[B, Hq, Q, D]`, and k and v `[B, Hkv, S, D]`.

    `columns` `[B, 1|Hkv, S]` are those of the slots, `new` `[B, Q]` those of the queries.
    """
    q, k, v = states
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    columns = columns.expand(-1, KV_HEADS, -1).repeat_interleave(HEADS // KV_HEADS, 1)[:, :, None]
    scores = q @ k.transpose(-1, -2) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = (columns < 0) | (columns > new[:, None, :, None])
    if mask is not None:
        at = columns.clamp(min=0).expand(-1, -1, q.shape[2], -1)
        here = mask.gather(-1, at)
        if mask.dtype == torch.bool:
            hidden = hidden | ~here
        else:
            scores = scores + here
    scores = scores.masked_fill(hidden, -1e300)
    if sinks is not None:
        extra = sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, extra], -1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


CASES: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0},
    {"sinks": True},
    {"sinks": True, "frozen": True},
    {"mask": "bool"},
    {"mask": "float"},
    {"padding": [0, 70]},
    {"evicted": True},
    {"evicted": True, "padding": [0, 70]},
    {"softcap": 3.0, "sinks": True, "mask": "float", "evicted": True},
    {"softcap": 3.0, "sinks": True, "dropout": 0.3},
]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_gradients_equal_a_plain_softmax(case):
    """Of queries, keys, values and sinks.

    Before the backward pass the cache evicts, and two more steps write to its slots, in place.
    """
    driver = Driver([H2O(20, 20)], ROWS, HEADS, KV_HEADS)
    padding = case.get("padding", [0, 0])
    if case.get("evicted"):
        with torch.no_grad():
            driver.step(driver.tokens(90), padding)
        padding = [0, 0]
    before, cache = driver.cache.seen, driver.cache
    tokens = driver.tokens(LONG)
    driver.mask = torch.cat([driver.mask, torch.ones(ROWS, LONG, dtype=torch.long)], 1)
    for row, count in enumerate(padding):
        driver.mask[row, before : before + count] = 0
    cache.open_step(ROWS, LONG, driver.mask, torch.device("cpu"))
    handle = cache.at_layer(0)
    keys, values = cache.update(tokens.k, tokens.v, 0)
    columns = cache.layers[0].columns.clone()
    given = [t.detach().clone() for t in (tokens.q, keys, values)]
    states = [t.requires_grad_(not case.get("frozen")) for t in given]
    sinks = torch.linspace(-1, 2, HEADS, dtype=torch.float64) if case.get("sinks") else None
    if sinks is not None:
        sinks.requires_grad_()
    mask = user_mask(case["mask"], LONG, before + LONG) if "mask" in case else None
    rule: Any = driver._rule() if mask is None else mask
    softcap, dropout = case.get("softcap"), case.get("dropout", 0.0)

    def output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(7)
        result, _ = slot_attention(
            "sdpa", driver.module, q, k, v, rule, kvprune_layer=handle,
            scaling=0.3, softcap=softcap, s_aux=sinks, dropout=dropout,
        )  # fmt: skip
        return result

    valid = driver.mask[:, before:].bool()
    way = torch.randn(ROWS, LONG, HEADS, 8, dtype=torch.float64) * valid[..., None, None]
    if dropout:
        check_by_differences(output, states, way, cache)
        return
    result = output(*states)
    cache.close_step(done=True)
    with torch.no_grad():
        driver.step(driver.tokens(1))
        driver.step(driver.tokens(1))
    wanted = [t for t in (*states, sinks) if t is not None and t.requires_grad]
    got = torch.autograd.grad((result * way).sum(), wanted)
    new = torch.arange(before, before + LONG).expand(ROWS, -1)
    expected = plain_softmax(states, columns, new, mask, sinks, softcap)
    torch.testing.assert_close(result[valid], expected[valid], rtol=1e-10, atol=1e-11)
    slopes = torch.autograd.grad((expected * way).sum(), wanted)
    torch.testing.assert_close(got, slopes, rtol=1e-9, atol=1e-10)


def check_by_differences(output: Any, states: list[Tensor], way: Tensor, cache: Any) -> None:
    """Gradients with dropout, whose random numbers begin at the same place in every call."""
    slots = cache.layers[0]
    held = copy.deepcopy(slots.__dict__)

    def restore() -> None:
        slots.__dict__.update(copy.deepcopy(held))

    result = output(*states)
    torch.manual_seed(1)
    got = torch.autograd.grad((result * way).sum(), states)
    for place, slope in enumerate(got):
        step = torch.randn(slope.shape, dtype=torch.float64) * 1e-6
        ends = []
        for sign in (1, -1):
            restore()
            moved = [t.detach() for t in states]
            moved[place] = moved[place] + sign * step
            ends.append((output(*moved) * way).sum().detach())
        restore()
        torch.testing.assert_close(
            (slope * step).sum() * 2, ends[0] - ends[1], rtol=1e-4, atol=1e-9
        )
    cache.close_step(done=False)
