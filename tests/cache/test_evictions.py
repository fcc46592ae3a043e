"""`on_evict` is told what goes, all of it and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.cache.evictions import Eviction
from kvprune.policies import H2O, AdaKV, Knorm, KVzip, SnapKV, StreamingLLM

from ..support.family_models import attached_family
from ..support.models import LAYERS, prompt, tiny_model
from ..support.strategies import sdtp_pruner

POLICIES: list[list[Any]] = [
    [H2O(3, 4)],
    [H2O(3, 4, layers=[1]), StreamingLLM(2, 9)],
    [AdaKV(SnapKV(0.3, window=4, kernel=1))],
    [sdtp_pruner(0.5), H2O(0.2, 0.2)],
    [Knorm(6, when=3)],
    [StreamingLLM(1, 5, positions="cache")],
]


def sets(columns: torch.Tensor, heads: int) -> list[list[set[int]]]:
    """By row and head, without the -1."""
    return [
        [set(head[head >= 0].tolist()) for head in row.expand(heads, -1)] for row in columns.cpu()
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("policies", POLICIES, ids=repr)
def test_what_was_shown_is_held_or_was_told(policies, family):
    """In each row and head: what is held, what was told as evicted, what never entered."""
    if family != "llama" and any("rank_hidden" in policy.hooks for policy in policies):
        pytest.skip("heads for one model")
    model = tiny_model() if family == "llama" else attached_family(family)
    cache, told = ComposedCache(policies), list[Eviction]()
    cache.on_evict = told.append
    ids, mask = prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :6] = 0
    model.generate(
        ids, attention_mask=mask, cache=cache, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    assert told and all(each.seen <= cache.seen for each in told)
    assert len({each.seen for each in told}) > 1 or policies[0].when == "prompt"
    for layer in range(LAYERS):
        heads = 2
        held = sets(cache.columns(layer), heads)
        mine = [each for each in told if each.layer == layer]
        gone = [sets(each.columns, heads) for each in mine]
        pruned = [sets(each.pruned[:, None], heads) for each in mine]
        for row in range(2):
            shown = set(range(6 if row else 0, cache.seen))
            for head in range(heads):
                parts = [held, *gone, *pruned]
                each = [part[row][head] for part in parts]
                assert set().union(*each) == shown
                assert sum(map(len, each)) == len(shown)
    if "rank_hidden" in policies[0].hooks:
        assert any(each.pruned.numel() for each in told)


@pytest.mark.parametrize("policies", POLICIES[:2], ids=repr)
def test_drafts_that_are_taken_back(policies):
    """What comes back was never told; in the end all is told that is gone."""
    model, cache, told = tiny_model(), ComposedCache(policies), list[Eviction]()
    cache.on_evict = told.append
    ids = prompt(1, 12).repeat(1, 3)
    model.generate(ids, cache=cache, max_new_tokens=20, prompt_lookup_num_tokens=4, do_sample=False)
    for layer in range(LAYERS):
        for head in range(2):
            held = sets(cache.columns(layer), 2)[0][head]
            mine = [sets(each.columns, 2)[0][head] for each in told if each.layer == layer]
            assert set().union(held, *mine) == set(range(cache.seen))
            assert len(held) + sum(map(len, mine)) == cache.seen


def test_a_copy_has_the_same_listener():
    """Not a copy of it, which nobody would ever read."""
    model, cache, told = tiny_model(), ComposedCache([H2O(3, 4)]), list[Eviction]()
    cache.on_evict = told.append
    twin = copy.deepcopy(cache)
    model.generate(prompt(1, 30), cache=twin, max_new_tokens=2, do_sample=False)
    assert told


def test_a_prompt_that_is_read_twice():
    """What goes behind the second reading is told once."""
    model, cache, told = tiny_model(), ComposedCache([KVzip(0.5)]), list[Eviction]()
    cache.on_evict = told.append
    kvprune.read(model, cache, prompt(1, 30))
    assert {each.layer for each in told} == set(range(LAYERS))
    assert {each.seen for each in told} == {30}
    for each in told:
        (gone,), (held,) = sets(each.columns, 2), sets(cache.columns(each.layer), 2)
        assert [a | b for a, b in zip(gone, held, strict=True)] == [set(range(30))] * 2
        assert not any(a & b for a, b in zip(gone, held, strict=True))


def test_nothing_is_told_where_nothing_goes():
    """And what is told has a short text."""
    model, cache, told = tiny_model(), ComposedCache([H2O(20, 20)]), list[Eviction]()
    cache.on_evict = told.append
    model.generate(prompt(1, 12), cache=cache, max_new_tokens=4, do_sample=False)
    assert not told
    cache.reset()
    model.generate(prompt(1, 50), cache=cache, max_new_tokens=2, do_sample=False)
    assert repr(told[0]) == "Eviction(seen=50, layer=0: 20 slots, 0 pruned)"


def test_an_error_of_the_listener_reaches_the_caller():
    """The cache is as without it, and goes on."""
    model, cache = tiny_model(), ComposedCache([H2O(3, 4)])
    twin = ComposedCache([H2O(3, 4)])

    def fails(eviction: Eviction) -> None:
        raise RuntimeError("mine")

    cache.on_evict = fails
    with torch.no_grad(), pytest.raises(RuntimeError, match="mine"):
        model(prompt(1, 30), past_key_values=cache, logits_to_keep=1)
    cache.on_evict = None
    with torch.no_grad():
        model(prompt(1, 30), past_key_values=twin, logits_to_keep=1)
        more = [model(prompt(1, 1, 1), past_key_values=c).logits for c in (cache, twin)]
    assert torch.equal(*more)
    assert torch.equal(cache.columns(2), twin.columns(2))


def test_an_error_of_the_listener_at_the_beginning_of_a_forward():
    """Drafts that nobody took back are told then; the cache is not locked."""
    model, cache = tiny_model(), ComposedCache([H2O(3, 4)])

    def fails(eviction: Eviction) -> None:
        raise RuntimeError("mine")

    with torch.no_grad():
        model(prompt(1, 30), past_key_values=cache, logits_to_keep=1)
        cache.activate_past_recording()
        cache.on_evict = fails
        model(prompt(1, 3), past_key_values=cache)
        with pytest.raises(RuntimeError, match="mine"):
            model(prompt(1, 1), past_key_values=cache)
        cache.on_evict = None
        model(prompt(1, 1), past_key_values=cache)
    cache.reset()
    assert cache.seen == 0


def test_who_cannot_be_called_cannot_listen():
    """The cache goes on as it was."""
    cache, told = ComposedCache([SnapKV(4, window=2)]), []
    cache.on_evict = told.append
    with pytest.raises(KVPruneError, match=r"on_evict: expected what can be called .* got 5"):
        cache.on_evict = 5  # type: ignore[assignment]
    assert cache.on_evict == told.append
    cache.on_evict = None
    assert cache.on_evict is None
