"""A cache that meets other modes than it began in: gradients, inference mode, autocast."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvprune
from kvprune.policies import H2O, ExpectedAttention, StreamingLLM
from kvprune.storage.plain import Plain

from ..support.models import fresh_model, prompt
from ..support.strategies import sdtp_pruner

MODES: dict[str, Any] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}
EDGES = (0, 12, 13, 14, 15, 20, 21)
ORDERS = [
    ("inference", "grad", "no_grad", "inference"),
    ("inference", "no_grad", "grad", "inference"),
    ("no_grad", "inference", "grad", "no_grad"),
    ("grad", "no_grad", "inference", "grad"),
    ("grad", "inference", "no_grad", "grad"),
]
POLICIES: dict[str, list[kvprune.TokenPolicy]] = {
    "dense": [],
    "h2o": [H2O(3, 4)],
    "h2o-inside": [H2O(3, 4, positions="cache")],
    "h2o-one-layer": [H2O(3, 4, layers=[1])],
    "streaming": [StreamingLLM(2, 5)],
    "streaming-inside": [StreamingLLM(2, 5, positions="cache")],
    "union": [H2O(2, 3) | StreamingLLM(1, 3)],
    "sdtp": [sdtp_pruner(0.6)],
    "sdtp+h2o": [sdtp_pruner(0.6), H2O(3, 4)],
}
ROOMY: dict[str, list[kvprune.TokenPolicy]] = {
    "dense": [],
    "h2o": [H2O(99, 99)],
    "h2o-inside": [H2O(99, 99, positions="cache")],
    "streaming": [StreamingLLM(2, 99)],
    "streaming-inside": [StreamingLLM(2, 99, positions="cache")],
}


def turns(model: Any, cache: Any, modes: list[str], cuts: list[bool] | None = None) -> list[Tensor]:
    """Logits of forwards of several tokens and of one, each in its mode.

    `cuts` says behind which of them the cache is cut off from gradients.
    """
    ids, logits = prompt(2, EDGES[-1]), []
    for turn, (start, stop) in enumerate(pairwise(EDGES)):
        with MODES[modes[turn]]():
            logits.append(model(ids[:, start:stop], past_key_values=cache).logits)
        if cuts is not None and cuts[turn]:
            cut_off(cache)
    return logits


def gradients(model: Any, logits: list[Tensor]) -> list[Tensor | None]:
    """Those of all logits that have any, by parameter."""
    model.zero_grad()
    torch.stack([one.square().sum() for one in logits if one.requires_grad]).sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def modes_of(order: tuple[str, ...]) -> list[str]:
    """The mode of each forward of `turns`."""
    count = len(EDGES) - 1
    return [order[turn * len(order) // count] for turn in range(count)]


def cut_off(cache: kvprune.ComposedCache) -> None:
    """What the cache holds has no gradients from here on."""
    for _, layer in cache.slot_layers():
        held = layer.rectangles[0].held
        if isinstance(held, Plain):
            held.buffers = tuple(buffer.detach() for buffer in held.buffers)
    inside: Any = cache.state.positions
    if hasattr(inside, "_home"):
        inside._home = [None if home is None else home.detach() for home in inside._home]


@pytest.fixture(params=["all", "queries"])
def model(request: Any) -> Any:
    """With gradients for all weights, or for the queries' alone, for which keys are saved too."""
    made = kvprune.attach(fresh_model())
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(request.param == "all" or "q_proj" in name)
    return made


QUICK = ("h2o-inside", "sdtp+h2o")


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in POLICIES]
)
def test_modes_may_follow_each_other(name, order, model):
    """The logits of one mode alone, and the gradients of what was computed with gradients.

    The reference has gradients throughout, cut off from what has none here. At a full budget, so
    that slots are written in place where that may be.
    """
    modes, (mine, reference) = (
        modes_of(order),
        (kvprune.ComposedCache(POLICIES[name]) for _ in range(2)),
    )
    tracked = [mode == "grad" for mode in modes]
    got = turns(model, mine, modes)
    expected = turns(model, reference, ["grad"] * len(modes), [not one for one in tracked])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert [one.requires_grad for one in got] == tracked
    meant = [one for one, is_meant in zip(expected, tracked, strict=True) if is_meant]
    torch.testing.assert_close(
        gradients(model, got), gradients(model, meant), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("name", ROOMY)
def test_modes_do_what_they_do_with_a_dynamic_cache(name, order, model):
    """Logits and gradients, where nothing is evicted."""
    caches = (kvprune.ComposedCache(ROOMY[name]), DynamicCache())
    logits = [turns(model, cache, modes_of(order)) for cache in caches]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-10)
    each = (gradients(model, one) for one in logits)
    torch.testing.assert_close(*each, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "policy", [ExpectedAttention(12), StreamingLLM(2, 9, positions="cache")], ids=repr
)
def test_rotations_of_half_precision_are_found_under_autocast(policy):
    """Autocast on a CPU to bfloat16 refuses to put tensors of half precision together."""
    model = kvprune.attach(fresh_model(dtype=torch.float16))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        cache = kvprune.ComposedCache([policy])
        for count in (30, 1):
            assert model(prompt(1, count), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("name", POLICIES)
def test_a_copy_that_was_made_in_inference_mode_goes_on_outside(name, model):
    """What a policy asks of it for the first time is not taken for what somebody wrote to."""
    ids, cache = prompt(2, 16), kvprune.ComposedCache(POLICIES[name])
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
    with torch.inference_mode():
        twin = copy.deepcopy(cache)
    with torch.no_grad():
        for i in range(12, 16):
            mine, theirs = (model(ids[:, i : i + 1], past_key_values=c) for c in (cache, twin))
            torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", POLICIES)
def test_what_began_in_inference_mode_can_be_taken_back_and_picked(name, model):
    """Drafts on record and rows, in one mode after the other; logits as in one alone."""
    ids, logits = prompt(2, 30), []
    for order in (("inference", "grad", "no_grad"), ("grad", "inference", "no_grad"), ("no_grad",)):
        cache, outputs = kvprune.ComposedCache(POLICIES[name]), []
        modes = [MODES[order[i % len(order)]] for i in range(9)]
        for i, new in enumerate((slice(0, 12), slice(12, 13), slice(13, 14))):
            with modes[i]():
                outputs.append(model(ids[:, new], past_key_values=cache).logits)
        cache.announce_prompt(0, 14)
        cache.activate_past_recording()
        with modes[3]():
            outputs.append(model(ids[:, 14:18], past_key_values=cache).logits)
        with modes[4]():
            cache.crop(-2)
        with modes[5]():
            cache.batch_select_indices(torch.tensor([1, 0, 1]))
        with modes[6]():
            outputs.append(model(ids[[1, 0, 1], 16:19], past_key_values=cache).logits)
        with modes[7]():
            cache.crop(-3)
        with modes[8]():
            outputs.append(model(ids[[1, 0, 1], 16:17], past_key_values=cache).logits)
        logits.append([one.detach().clone() for one in outputs])
        if any(one.requires_grad for one in outputs):
            gradients(model, outputs)
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(logits[1], logits[2], rtol=1e-9, atol=1e-10)


CASTS = [(True, False), (False, True), (True, False, True), (False, True, False)]


def cast_turns(model: Any, cache: Any, casts: tuple[bool, ...]) -> list[Tensor]:
    """Logits of a prompt, single tokens and a second turn; autocast (bfloat16) as `casts` says."""
    ids, logits = prompt(2, EDGES[-1]), []
    for turn, (start, stop) in enumerate(pairwise(EDGES)):
        on = casts[turn * len(casts) // (len(EDGES) - 1)]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            logits.append(model(ids[:, start:stop], past_key_values=cache).logits.float())
    return logits


@pytest.mark.parametrize("casts", CASTS, ids=repr)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", ROOMY)
def test_autocast_may_change_between_forwards(name, family, backend, casts):
    """Keys and values take the dtypes that those of a DynamicCache take, and give its logits.

    Bit for bit where its backend computes them; elsewhere nearly as near to the model without
    autocast as the DynamicCache, up to one more rounding to bfloat16.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "backend": backend}
    model: Any = kvprune.attach(fresh_model(family, **options))
    cache, dense = kvprune.ComposedCache(ROOMY[name]), DynamicCache()
    got, expected = (cast_turns(model, each, casts) for each in (cache, dense))
    for mine, stock in zip(cache.layers, dense.layers, strict=True):
        stock_layer: Any = stock
        assert mine.keys.dtype == stock_layer.keys.dtype
        assert mine.values.dtype == stock_layer.values.dtype
        assert all(value.dtype == torch.float32 for value in mine.statistics.values())
    if name.startswith("h2o"):
        exact = cast_turns(model, DynamicCache(), (False,))
        for one, other, true in zip(got, expected, exact, strict=True):
            assert (one - true).norm() <= 2 * (other - true).norm() + 2**-8 * true.norm()
    else:
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("casts", CASTS, ids=repr)
@pytest.mark.parametrize("name", POLICIES)
def test_a_full_budget_stands_autocast_that_changes(name, casts):
    """Slots are written in place, keys are turned, drafts are taken back: near to no autocast."""
    model: Any = kvprune.attach(fresh_model(dtype=torch.float32, initializer_range=0.1))
    cache, ids = kvprune.ComposedCache(POLICIES[name]), prompt(2, 30)
    cast_turns(model, cache, casts)
    cache.announce_prompt(0, EDGES[-1])
    for on in (casts[0], casts[1]):
        cache.activate_past_recording()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            before = cache.columns(1)
            model(ids[:, 21:24], past_key_values=cache)
        cache.crop(-3)
        assert torch.equal(cache.columns(1), before)
    assert cache.layers[1].keys.dtype == cache.layers[1].values.dtype == torch.float32
