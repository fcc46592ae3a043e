"""The lazy mask against the stock masks, and masks that the user hands in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import kvprune
from kvprune.attention.masks import GivenMask, LazyMask, additive
from kvprune.policies import H2O

from ..support.models import left_padded, plain_model, prompt, tiny_model
from ..support.strategies import sdtp_heads, sdtp_pruner

RULES = {
    "causal": causal_mask_function,
    "sliding": sliding_window_causal_mask_function(5),
    "chunked": chunked_causal_mask_function(6, torch.zeros(2, dtype=torch.long)),
}


@given(st.sampled_from(sorted(RULES)), st.integers(1, 12), st.integers(0, 12), st.data())
def test_at_all_columns_it_is_the_stock_mask(name, count, seen, data):
    """And at some columns, those entries of it."""
    total = seen + count
    mask = torch.ones(2, total, dtype=torch.bool)
    mask[1, : data.draw(st.integers(0, total - 1))] = False
    stock = sdpa_mask(
        batch_size=2,
        q_length=count,
        kv_length=total,
        q_offset=seen,
        mask_function=RULES[name],
        attention_mask=mask,
        allow_is_causal_skip=False,
    )
    queries = torch.arange(seen, total).expand(2, -1)
    slots = torch.arange(total).expand(2, -1).masked_fill(~mask, -1)
    lazy = LazyMask(RULES[name], plainly_causal=name == "causal")
    assert torch.equal(lazy.at(queries, slots[:, None]), stock)
    order = torch.tensor([data.draw(st.permutations(range(total))) for _ in range(4)])
    order = order.view(2, 2, total)[..., : data.draw(st.integers(1, total))]
    some = slots[:, None].expand(-1, 2, -1).gather(-1, order)
    expected = stock.expand(-1, 2, -1, -1).gather(-1, order[:, :, None].expand(-1, -1, count, -1))
    assert torch.equal(lazy.at(queries, some), expected)
    assert torch.equal(lazy.at(queries[1:], some[1:], row=1), expected[1:])


@given(st.integers(1, 8), st.integers(0, 6), st.sampled_from([1, 4]), st.booleans(), st.data())
def test_a_given_mask_is_gathered_at_the_columns(count, seen, heads, additively, data):
    """Bool or float, one for all heads or one each; empty slots are hidden."""
    total = seen + count
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mask = torch.rand(2, heads, count, total, generator=generator) > 0.3
    given_mask = additive(mask, torch.float64) if additively else mask
    queries = torch.arange(seen, total).expand(2, -1)
    picks = [data.draw(st.permutations(range(total))) for _ in range(4)]
    slots = torch.tensor(picks).view(2, 2, total)
    slots[..., data.draw(st.integers(0, total - 1))] = -1
    got = GivenMask(given_mask, seen).at(queries, slots)
    got = got if got.dtype == torch.bool else got == 0
    for row in range(2):
        for head in range(got.shape[1]):
            kv = head * 2 // got.shape[1]
            for i, slot in enumerate(slots[row, kv].tolist()):
                expected = mask[row, head % heads, :, slot] & torch.tensor(slot >= 0)
                assert torch.equal(got[row, head, :, i], expected)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("policies", [[], [H2O(99, 99)]], ids=repr)
def test_a_four_d_mask_works_as_in_the_dense_model(kind, policies):
    """A prompt whose second half does not see its first quarter, then two more tokens."""
    ids = prompt(2, 22)
    mask = torch.ones(22, 22, dtype=torch.bool).tril()
    mask[10:, :5] = False
    mask = mask.expand(2, 1, -1, -1)
    mask = additive(mask, torch.float64) if kind == "float" else mask
    results = []
    for model, cache in (
        (plain_model(), DynamicCache()),
        (tiny_model(), kvprune.ComposedCache(policies)),
    ):
        with torch.no_grad():
            for new in (slice(0, 20), slice(20, 22)):
                now = mask[:, :, new, : new.stop]
                out = model(ids[:, new], attention_mask=now, past_key_values=cache)
                results.append(out.logits)
    torch.testing.assert_close(results[2:], results[:2], rtol=1e-10, atol=1e-11)


def test_a_causal_four_d_mask_changes_nothing_when_tokens_are_pruned_and_evicted():
    """Its rows follow the tokens left, its columns the slots left."""
    from kvprune.policies import SDTP

    def policies():
        return [SDTP(sdtp_heads(), 0.6, min_tokens=6), H2O(3, 4)]

    ids, logits = prompt(2, 24), []
    causal = torch.ones(24, 24, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    for four_d in (False, True):
        cache = kvprune.ComposedCache(policies())
        with torch.no_grad():
            for new in (slice(0, 20), slice(20, 21), slice(21, 24)):
                mask = causal[:, :, new, : new.stop] if four_d else None
                output = tiny_model()(ids[:, new], attention_mask=mask, past_key_values=cache)
                logits.append(output.logits[:, -1])
    torch.testing.assert_close(logits[3:], logits[:3], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("policies", [[], [sdtp_pruner(0.6)]], ids=["dense", "sdtp"])
def test_layers_that_hold_the_same_columns_share_one_mask(policies, monkeypatch):
    """A padded prompt: one evaluation for all layers, one more for each pruning."""
    seen = []
    evaluate = causal_mask_function

    def counted(*indices):
        seen.append(indices)
        return evaluate(*indices)

    monkeypatch.setattr("transformers.masking_utils.causal_mask_function", counted)
    inputs = left_padded(prompt(2, 20), [0, 4])
    with torch.no_grad():
        tiny_model()(**inputs, past_key_values=kvprune.ComposedCache(policies))
    assert len(seen) == (3 if policies else 1)


def test_stock_caches_get_the_stock_mask():
    """An attached model without one of our caches is handed what it always was."""
    inputs = left_padded(prompt(2, 12), [0, 4])
    with torch.no_grad():
        logits = [m(**inputs).logits for m in (plain_model(), tiny_model())]
    assert torch.equal(*logits)
