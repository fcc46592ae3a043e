"""Layers that are alike evict at once, and nobody can tell."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch

import kvprune
from kvprune import KVPruneError
from kvprune.policies import H2O, StreamingLLM

from ..support.models import fresh_model, left_padded, prompt


@dataclass(frozen=True, repr=False)
class _H2OEachByItself(H2O):
    layers_alike = False


@dataclass(frozen=True, repr=False)
class _StreamingEachByItself(StreamingLLM):
    layers_alike = False


PIPELINES = {
    "H2O": [([H2O(4, 4)], [_H2OEachByItself(4, 4)])],
    "StreamingLLM": [([StreamingLLM(2, 6)], [_StreamingEachByItself(2, 6)])],
    "layers of two kinds": [
        (
            [H2O(4, 4, layers=[0, 2]), StreamingLLM(2, 9, layers=[1, 3])],
            [_H2OEachByItself(4, 4, layers=[0, 2]), _StreamingEachByItself(2, 9, layers=[1, 3])],
        )
    ],
}
MODES = {"no grad": torch.no_grad, "inference": torch.inference_mode, "grad": nullcontext}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("pipelines", PIPELINES.values(), ids=PIPELINES)
def test_asked_at_once_or_one_by_one_is_the_same(pipelines, padding, mode):
    """Bit for bit, through decoding, a change of rows, a copy, and a second turn."""
    model = kvprune.attach(fresh_model())
    caches = [kvprune.ComposedCache(policies) for policies in pipelines[0]]
    ids, rows = prompt(2, 60), torch.tensor([1, 1, 0])
    with mode():
        mask = left_padded(ids[:, :20], [0, padding])["attention_mask"] if padding else None
        _same(model, ids[:, :20], caches, mask)
        for i in range(20, 26):
            _same(model, ids[:, i : i + 1], caches)
        assert caches[0].state.together and not caches[1].state.together
        for cache in caches:
            cache.reorder_cache(rows)
        if not torch.is_grad_enabled():
            caches = [copy.deepcopy(cache) for cache in caches]
        for start, stop in [*((i, i + 1) for i in range(26, 32)), (32, 37), (37, 38), (38, 39)]:
            _same(model, ids[rows][:, start:stop], caches)


def _same(model, tokens, caches, mask=None):
    one, other = (model(tokens, past_key_values=c, attention_mask=mask).logits for c in caches)
    assert torch.equal(one, other)
    for layer in range(len(caches[0])):
        assert torch.equal(caches[0].columns(layer), caches[1].columns(layer))


def test_a_budget_that_decoding_fills():
    """Buffers have room to spare then; layers find together all the same."""
    model, ids = kvprune.attach(fresh_model()), prompt(1, 80)
    caches = [
        kvprune.ComposedCache([policy])
        for policy in (StreamingLLM(4, 38), _StreamingEachByItself(4, 38))
    ]
    with torch.no_grad():
        _same(model, ids[:, :20], caches)
        for i in range(20, 80):
            _same(model, ids[:, i : i + 1], caches)
    assert caches[0].state.together
    assert caches[0].nbytes <= caches[1].nbytes


def test_modes_may_change_between_steps():
    """What may be written in place in one mode may not in another."""
    model, ids = kvprune.attach(fresh_model()), prompt(1, 40)
    caches = [kvprune.ComposedCache([policy]) for policy in (H2O(4, 4), _H2OEachByItself(4, 4))]
    modes = [torch.inference_mode, torch.no_grad, nullcontext, torch.no_grad]
    with torch.no_grad():
        _same(model, ids[:, :20], caches)
    for i in range(20, 40):
        with modes[i // 2 % 4]():
            _same(model, ids[:, i : i + 1], caches)


def test_a_copy_has_nothing_in_common():
    """Not even what its layers share with each other."""
    model, ids = kvprune.attach(fresh_model()), prompt(1, 40)
    cache = kvprune.ComposedCache([H2O(4, 4)])
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        for i in range(20, 24):
            model(ids[:, i : i + 1], past_key_values=cache)
        twin, before = copy.deepcopy(cache), cache.columns(0)
        for i in range(24, 30):
            model(ids[:, i : i + 1], past_key_values=twin)
    assert twin.columns(0).max() == 29
    assert torch.equal(cache.columns(0), before)


def test_a_promise_that_is_not_kept_is_found_out():
    """At the first question, not only where layers are asked at once."""

    @dataclass(frozen=True, repr=False)
    class LooksAtKeys(H2O):
        def rank_slots(self, slots):
            slots.keys.norm(dim=-1)
            return super().rank_slots(slots)

    model = kvprune.attach(fresh_model())
    with pytest.raises(KVPruneError, match="layers_alike"):
        model(prompt(1, 20), past_key_values=kvprune.ComposedCache([LooksAtKeys(4, 4)]))


def test_what_goes_wrong_at_the_end_leaves_the_cache_unusable():
    """The forward's tokens are in by then."""

    @dataclass(frozen=True, repr=False)
    class Fails(H2O):
        def rank_slots(self, slots):
            if slots.columns.shape[0] > 1:
                raise RuntimeError("in the middle")
            return super().rank_slots(slots)

    model, ids = kvprune.attach(fresh_model()), prompt(1, 30)
    cache = kvprune.ComposedCache([Fails(4, 4)])
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(RuntimeError, match="in the middle"):
            model(ids[:, 20:21], past_key_values=cache)
        with pytest.raises(KVPruneError, match="reset"):
            model(ids[:, 29:], past_key_values=cache)
    cache.reset()
    assert not cache.is_initialized
