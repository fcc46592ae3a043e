"""Hybrid models: some layers keep a state instead of slots."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

import kvprune
from kvprune.policies import H2O, StreamingLLM
from kvprune.statistics import Attention

from ..support.family_models import StaysDouble, attached_family, linear_of, plain_family
from ..support.models import LAYERS, left_padded, prompt
from ..support.strategies import sdtp_pruner

FAMILY = "qwen3_next"


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), StaysDouble():
        yield


@pytest.fixture
def cache() -> kvprune.ComposedCache:
    """Two rows of 12 tokens, the second padded, pruned and evicted."""
    held = kvprune.ComposedCache([sdtp_pruner(0.6), H2O(3, 3)])
    attached_family(FAMILY)(**left_padded(prompt(2, 12), [0, 4]), past_key_values=held)
    return held


def follow(cache: kvprune.ComposedCache, steps: int = 3) -> torch.Tensor:
    """Logits of some more single tokens, the same for all rows."""
    model, tokens = attached_family(FAMILY), prompt(1, steps, seed=9).expand(cache.batch_size, -1)
    steps_of = (model(t, past_key_values=cache).logits for t in tokens.split(1, dim=1))
    return torch.cat(list(steps_of), 1)


def test_linear_layers_keep_their_stock_class(cache):
    """And have no columns, which the error says; the others are as ever."""
    for layer in range(LAYERS):
        if layer in linear_of(FAMILY):
            assert type(cache.layers[layer]) is LinearAttentionLayer
            with pytest.raises(kvprune.KVPruneError, match=r"holds no slots.*linear-attention"):
                cache.columns(layer)
        else:
            assert cache.columns(layer).shape[-1] == {1: 6, 3: 4}[layer]
    assert "layer 1: 6/12 slots" in repr(cache) and "layer 0" not in repr(cache)


def test_bytes_of_states_count(cache):
    """All of them."""
    states = [
        state
        for layer in linear_of(FAMILY)
        for state in (cache.layers[layer].conv_states[0], cache.layers[layer].recurrent_states[0])
    ]
    before = cache.nbytes
    for layer in linear_of(FAMILY):
        cache.layers[layer].conv_states[0] = cache.layers[layer].recurrent_states[0] = None
    assert before - cache.nbytes == sum(s.untyped_storage().nbytes() for s in states)


def test_copies_are_independent(cache):
    """A deep copy goes on as its original does, whatever happened to that in between."""
    twin, other = copy.deepcopy(cache), copy.deepcopy(cache)
    expected = follow(cache)
    assert torch.equal(follow(twin), expected)
    assert torch.equal(follow(other), expected)
    assert not torch.equal(follow(cache), expected)


@pytest.mark.parametrize("how", ["reorder", "select", "repeat"])
def test_rows_move_with_their_states(cache, how):
    """What a row computes goes with it."""
    expected = follow(copy.deepcopy(cache))
    if how == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
        rows = [1, 0]
    elif how == "select":
        cache.batch_select_indices(torch.tensor([1]))
        rows = [1]
    else:
        cache.batch_repeat_interleave(2)
        rows = [0, 0, 1, 1]
    torch.testing.assert_close(follow(cache), expected[rows], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 5}], ids=str)
def test_generate_s_modes_equal_dynamic_cache(options):
    """Beams and chunks, with roomy budgets."""
    inputs = left_padded(prompt(2, 13), [0, 4])
    how = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True, **options}
    plain = plain_family(FAMILY)
    expected = plain.generate(**inputs, past_key_values=DynamicCache(config=plain.config), **how)
    roomy = kvprune.ComposedCache([StreamingLLM(2, 500)])
    got = attached_family(FAMILY).generate(**inputs, cache=roomy, **how)
    assert torch.equal(got.sequences, expected.sequences)
    for mine, dense in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-9, atol=1e-10)


def test_reset_forgets_the_states(cache):
    """As a new cache."""
    cache.reset()
    inputs = left_padded(prompt(2, 12), [0, 4])
    fresh = kvprune.ComposedCache([sdtp_pruner(0.6), H2O(3, 3)])
    got, expected = (
        attached_family(FAMILY)(**inputs, past_key_values=c).logits for c in (cache, fresh)
    )
    assert torch.equal(got, expected)


def refuses(cache: kvprune.ComposedCache, match: str, call: Callable[[], Any]) -> None:
    """Refused by name, and unchanged."""
    expected = follow(copy.deepcopy(cache))
    with pytest.raises(kvprune.KVPruneError, match=match):
        call()
    assert torch.equal(follow(cache), expected)


def test_crop_is_refused():
    """A state cannot go back; taking nothing back is nothing."""
    cache = kvprune.ComposedCache([])
    attached_family(FAMILY)(prompt(2, 12), past_key_values=cache)
    refuses(cache, "states of the linear-attention layers cannot go back", lambda: cache.crop(-1))
    twin = copy.deepcopy(cache)
    cache.crop(0)
    assert torch.equal(follow(cache), follow(twin))


def test_rows_that_would_part_ways_are_refused(cache):
    """A later forward of several tokens, which prunes, in more than one row."""
    model, ids = attached_family(FAMILY), prompt(2, 8)
    mask = torch.cat([left_padded(prompt(2, 12), [0, 4])["attention_mask"], torch.ones(2, 8)], 1)
    refuses(
        cache,
        r"^SDTP.*later forward of several tokens in 2 rows.*one row per cache",
        lambda: model(ids, attention_mask=mask.long(), past_key_values=cache),
    )


def test_a_mask_that_hides_what_was_shown_is_refused():
    """The states have it in them; the other families drop its slots."""
    cache = kvprune.ComposedCache([])
    attached_family(FAMILY)(prompt(2, 12), past_key_values=cache)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :2] = 0
    refuses(
        cache,
        "hides columns that this model's linear-attention layers have taken",
        lambda: attached_family(FAMILY)(prompt(2, 1), attention_mask=mask, past_key_values=cache),
    )


class LooksBack(kvprune.TokenPolicy):
    """Ranks hidden tokens by what they received in the layer before."""

    statistics = (Attention(),)

    def rank_hidden(self, tokens):
        if tokens.layer in (0, 1):
            return None
        score = tokens.statistic(Attention()).sum(1, keepdim=True)
        budget = tokens.length - 2
        return kvprune.Ranking(score, torch.zeros_like(score, dtype=torch.bool), budget)


def test_a_layer_after_a_state_has_no_statistics():
    """What the layer before that observed is not taken for the last one's."""
    cache = kvprune.ComposedCache([LooksBack()])
    with pytest.raises(kvprune.KVPruneError, match="behind a layer without attention"):
        attached_family(FAMILY)(prompt(1, 12), past_key_values=cache)
