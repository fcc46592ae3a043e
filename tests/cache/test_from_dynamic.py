"""A stock cache taken over is a cache that has read the same with its policies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvprune import ComposedCache, KVPruneError, Quantized
from kvprune.policies import H2O, AdaKV, ChunkKV, CriticalKV, KeyDiff, Knorm, Random, StreamingLLM
from kvprune.statistics import Attention

from ..support.family_models import attached_family, plain_family
from ..support.models import left_padded, plain_model, prompt, tiny_model
from ..support.strategies import sdtp_pruner

POLICIES: list[list[Any]] = [
    [],
    [Knorm(0.5)],
    [KeyDiff(9), StreamingLLM(2, 5)],
    [StreamingLLM(1, 0.3, when="prompt") | Knorm(4)],
    [AdaKV(Knorm(0.25))],
    [CriticalKV(KeyDiff(0.5, layers=[0, 2]))],
    [ChunkKV(Knorm(0.4), 3)],
    [Random(7, when=3)],
]


def both(
    family: str, policies: list[Any], store: Quantized | None, mask: torch.Tensor | None
) -> tuple[Any, ComposedCache, ComposedCache, torch.Tensor]:
    """The attached model, a cache that was taken over, one that has read itself, and the ids."""
    llama = family == "llama"
    stock = plain_model() if llama else plain_family(family)
    model: Any = tiny_model() if llama else attached_family(family)
    ids = prompt(2, 30)
    if mask is not None:
        ids = ids.masked_fill(mask == 0, 0)
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions}
    dynamic: Any = DynamicCache(config=stock.config)
    read = ComposedCache(policies, store=store)
    with torch.no_grad():
        stock(ids, past_key_values=dynamic, **given)
        model(ids, past_key_values=read, logits_to_keep=1, **given)
    before = copy.deepcopy(dynamic)
    taken = ComposedCache.from_dynamic(dynamic, policies, model, attention_mask=mask, store=store)
    other = copy.deepcopy(taken)
    with torch.no_grad():
        # What the cache does later on does nothing to what it came from.
        for number in range(3):
            model(prompt(2, 1, number), past_key_values=other)
        last = ComposedCache.from_dynamic(dynamic, policies, model, attention_mask=mask)
        model(prompt(2, 2), past_key_values=last)
    for one, two in zip(dynamic.layers, before.layers, strict=True):
        assert torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values)
    return model, taken, read, ids


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2", "deepseek_v3"])
@pytest.mark.parametrize("policies", POLICIES, ids=repr)
def test_it_is_as_if_it_had_read_that(policies, family, padded):
    """Columns are the same, and tokens that follow; keys and values within rounding."""
    mask = left_padded(prompt(2, 30), [0, 7])["attention_mask"] if padded else None
    model, taken, read, ids = both(family, policies, None, mask)
    compared(model, taken, read, ids, mask)


@pytest.mark.parametrize("policies", [[], [Knorm(0.5)], [AdaKV(Knorm(0.25))]], ids=repr)
def test_in_a_store(policies):
    """Keys are quantised as they come: in the first layer, where nothing was read back before."""
    _, taken, _, _ = both("llama", policies, Quantized(8, 8), None)
    _, plain, _, _ = both("llama", policies, None, None)
    for layer in range(len(plain)):
        assert torch.equal(taken.columns(layer), plain.columns(layer))
    assert taken.nbytes < plain.nbytes


def compared(model: Any, taken: Any, read: Any, ids: torch.Tensor, mask: Any) -> None:
    """Both caches, and what they go on with."""
    assert taken.seen == read.seen and len(taken) == len(read)
    for layer in range(len(taken)):
        assert torch.equal(taken.columns(layer), read.columns(layer))
        order = [cache.state.slots(layer).columns.argsort(-1) for cache in (taken, read)]
        for name in ("keys", "values"):
            one, two = (
                getattr(cache.layers[layer], name).gather(2, by_head(cache, layer, name, at))
                for cache, at in zip((taken, read), order, strict=True)
            )
            width = min(one.shape[2], two.shape[2])
            torch.testing.assert_close(one[:, :, -width:], two[:, :, -width:], rtol=0, atol=1e-9)
    more: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    following = torch.cat([ids, prompt(2, 3, 1)], 1)
    if mask is not None:
        more["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :3])], 1)
    told = [model.generate(following, cache=cache, **more) for cache in (taken, read)]
    assert torch.equal(*told)
    for layer in range(len(taken)):
        assert torch.equal(taken.columns(layer), read.columns(layer))


def by_head(cache: Any, layer: int, name: str, order: torch.Tensor) -> torch.Tensor:
    """An index for keys or values, by which slots come in the order of their columns."""
    states = getattr(cache.layers[layer], name)
    return order.expand(-1, states.shape[1], -1)[..., None].expand(*states.shape)


def test_what_cannot_be_taken_over():
    """By name, before anything is stored."""
    model, stock, ids = tiny_model(), plain_model(), prompt(1, 12)
    dynamic = DynamicCache(config=stock.config)

    def refused(match: str, cache: Any, policies: list[Any], **given: Any) -> None:
        with pytest.raises(KVPruneError, match=match):
            ComposedCache.from_dynamic(cache, policies, given.pop("model", model), **given)

    refused("has read something, got an empty one", dynamic, [])
    with torch.no_grad():
        stock(ids, past_key_values=dynamic)
    refused("expected a DynamicCache .* got ComposedCache", ComposedCache([]), [])
    refused("got StaticCache", StaticCache(config=stock.config, max_cache_len=20), [])
    refused(r"H2O.* goes by Attention\(", dynamic, [Knorm(5), H2O(3, 3)])
    refused("goes by hidden states", dynamic, [sdtp_pruner(0.5)])
    refused("leave positions as they are", dynamic, [StreamingLLM(1, 5, positions="cache")])
    refused("attention_mask: expected shape", dynamic, [], attention_mask=torch.ones(1, 5))
    refused("attach", dynamic, [], model=stock)
    fewer = DynamicCache(config=stock.config)
    fewer.layers = dynamic.layers[:2]
    refused("with 4 layers, got 2 layers", fewer, [])
    wider = copy.deepcopy(dynamic)
    for layer in wider.layers:
        layer.keys = torch.cat([layer.keys, layer.keys], -1)
    refused(r"with \[8\] numbers a head, got \[16\]", wider, [])
    shorter = copy.deepcopy(dynamic)
    shorter.layers[2].keys = shorter.layers[2].keys[:, :, :9]
    refused("layer 2 holds 9 tokens of 12: expected at least 12", shorter, [])
    unfinished: Any = DynamicCache(config=stock.config)
    for index, layer in enumerate(dynamic.layers[:2]):
        unfinished.update(layer.keys, layer.values, index)
    refused("layer 2 holds 0 tokens of 12", unfinished, [])
    cache = ComposedCache.from_dynamic(dynamic, [Knorm(5)], model)
    assert cache.seen == 12 and cache.columns(0).shape[-1] == 5
    with pytest.raises(KVPruneError, match="which was not observed"):
        ComposedCache.from_dynamic(dynamic, [], model).with_policies([H2O(3, 3)], model)
    assert Attention().per == "slot"
