"""Activations that are not finite: other rows are right, and no policy is blamed."""

from __future__ import annotations

import re
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvprune
from kvprune.policies import H2O, StreamingLLM
from kvprune.positions.rotary import rotations_of

from ..support.models import fresh_model, prompt, tiny_model
from ..support.strategies import POLICIES, sdtp_pruner

BAD = 1
"""The row that is not finite, of three."""
EDGES = (0, 14, 15, 16, 17, 24, 25)
UNASKED = {None: 0, 3: 1, "prompt": 1, "first": 11}
"""Columns that came since a policy was last asked, by its `when`."""


def read(model: Any, policies: list[kvprune.TokenPolicy], states: torch.Tensor) -> Any:
    """Logits of each forward, and the cache."""
    cache, logits = kvprune.ComposedCache(policies), []
    for start, stop in pairwise(EDGES):
        with torch.no_grad():
            new = states[:, start:stop]
            logits.append(model(inputs_embeds=new, past_key_values=cache).logits)
    return logits, cache


def states_of(model: Any, bad: dict[int, float]) -> torch.Tensor:
    """`[3, n, C]`, with a number in place of a token's state in one row, by column."""
    states = model.get_input_embeddings()(prompt(3, EDGES[-1])).detach().clone()
    for column, value in bad.items():
        states[BAD, column] = value
    return states


BADS: list[dict[int, float]] = [{0: torch.nan}, {5: torch.nan}, {9: torch.inf, 20: -torch.inf}]


@pytest.mark.filterwarnings("ignore:the model's activations are not finite")
@pytest.mark.parametrize("bad", BADS, ids=repr)
@pytest.mark.parametrize("listed", POLICIES, ids=repr)
def test_other_rows_do_not_notice(listed, bad):
    """Their logits and columns are those of a batch that is finite; budgets hold in the bad row."""
    model, others = tiny_model(), [0, 2]
    expected, reference = read(model, [listed.make(6)], states_of(model, {}))
    got, cache = read(model, [listed.make(6)], states_of(model, bad))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one[others], other[others], rtol=1e-9, atol=1e-10)
        assert one[BAD, -1].isnan().all()
    for layer in range(len(cache)):
        kept = [one.columns(layer).expand(-1, 2, -1)[others].tolist() for one in (cache, reference)]
        sets = [[{c for c in head if c >= 0} for row in one for head in row] for one in kept]
        assert sets[0] == sets[1]
        if listed.bound is not None:
            most = listed.bound(6) + UNASKED[listed.make(6).when]
            assert cache.columns(layer).shape[-1] <= most


@pytest.mark.parametrize("listed", POLICIES, ids=repr)
def test_a_batch_of_nan_goes_on_as_with_a_dynamic_cache(listed):
    """A float16 model whose activations overflow behind its second layer."""
    model: Any = fresh_model(dtype=torch.float16)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e30)
    ids = prompt(2, 14)
    expected = model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=4)
    cache = kvprune.ComposedCache([listed.make(6)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model's activations are not finite")
        got = kvprune.attach(model).generate(ids, cache=cache, max_new_tokens=4)
    # NaN logits are one token over and over.
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("policy", "layer"), [(H2O(2, 4), 0), (sdtp_pruner(0.6), 1)], ids=repr)
def test_the_warning_says_where_and_how_to_mend(policy, layer):
    """Once for each forward of several tokens, at the first layer that had to be ranked."""
    model = tiny_model()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        read(model, [policy], states_of(model, {3: torch.nan}))
    said = [str(each.message) for each in found if "finite" in str(each.message)]
    assert len(said) == 2
    for one in said:
        assert f"at layer {layer} in rows [{BAD}]" in one and repr(policy) in one
        assert "bfloat16 or float32" in one
    assert all(each.category is RuntimeWarning for each in found if "finite" in str(each.message))


def test_no_warning_where_all_is_finite():
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for listed in POLICIES:
            read(model, [listed.make(6)], states_of(model, {}))


class NanOfItsOwn(kvprune.TokenPolicy):
    """Divides by zero in the last row."""

    def rank_slots(self, slots):
        """Norms of keys."""
        score = slots.keys.norm(dim=-1)
        score[-1] = torch.nan
        budget = torch.full((score.shape[0],), 6)
        return kvprune.Ranking(score, torch.zeros_like(score, dtype=torch.bool), budget)


@pytest.mark.filterwarnings("ignore:the model's activations are not finite")
@pytest.mark.parametrize("policies", [[NanOfItsOwn()], [H2O(3, 3), NanOfItsOwn()]], ids=repr)
def test_a_policy_that_makes_nan_by_itself_is_told(policies):
    """With its layer and rows; the row whose input is not finite is not held against it."""
    model = tiny_model()
    match = "expected scores that can be compared, got NaN scores at layer 0 in rows [2]"
    for bad in ({}, {3: torch.nan}):
        with pytest.raises(kvprune.KVPruneError) as error:
            read(model, policies, states_of(model, bad))
        assert str(error.value).startswith(f"{policies[-1]!r}: {match}")
        assert re.search(r"Mend the policy's hook", str(error.value))


def overflowing(dtype: torch.dtype = torch.float16) -> Any:
    """A model of which every layer but the first two is handed NaN."""
    model: Any = fresh_model(dtype=dtype)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(torch.inf)
    return model


def test_how_keys_are_turned_is_found_out_without_finite_activations():
    """The rotations are those of the model without an overflow."""
    found = rotations_of(overflowing(torch.float32).base_model)
    expected = rotations_of(fresh_model(dtype=torch.float32).base_model)
    for one, other in zip(found, expected, strict=True):
        assert one is not None and other is not None
        assert torch.equal(one.frequencies, other.frequencies)
        assert (one.start, one.interleaved) == (other.start, other.interleaved)


def test_keys_that_are_never_finite_are_named_as_the_reason():
    """Not the model's kind of positions."""
    model = fresh_model()
    model.model.layers[2].self_attn.k_proj.weight.data[0, 0] = torch.nan
    cache = kvprune.ComposedCache([StreamingLLM(2, 4, positions="cache")])
    with pytest.raises(kvprune.KVPruneError, match="keys are not finite"):
        kvprune.attach(model)(prompt(1, 9), past_key_values=cache)


class NanWhereNothingIs(kvprune.TokenPolicy):
    """Leaves NaN at slots that are not valid, as a mean over none of them does."""

    def rank_slots(self, slots):
        """The newest are best."""
        score = slots.columns.double().masked_fill(~slots.valid, torch.nan)
        budget = torch.full((score.shape[0],), 4)
        return kvprune.Ranking(score, torch.zeros_like(score, dtype=torch.bool), budget)


def test_nan_at_what_an_earlier_policy_dropped_is_nobodys_fault():
    """The second policy of a pipeline sees these slots as empty."""
    model = tiny_model()
    _, cache = read(model, [H2O(4, 4), NanWhereNothingIs()], states_of(model, {}))
    assert cache.columns(0).shape[-1] == 4


@pytest.mark.filterwarnings("ignore:the model's activations are not finite")
def test_nan_ranks_lowest_in_a_union_too():
    """A row of which some slots have no score: the union with itself keeps the same."""
    model = tiny_model()
    states = states_of(model, {5: torch.nan})

    class ByKeys(kvprune.TokenPolicy):
        """Small keys stay."""

        def rank_slots(self, slots):
            score = -slots.keys.norm(dim=-1)
            budget = torch.full((score.shape[0],), 4)
            return kvprune.Ranking(score, torch.zeros_like(score, dtype=torch.bool), budget)

    columns = []
    for policies in ([ByKeys(layers=[0])], [ByKeys(layers=[0]) | ByKeys(layers=[0])]):
        cache = kvprune.ComposedCache(policies)
        with torch.no_grad():
            model(inputs_embeds=states[:, :14], past_key_values=cache)
        columns.append(cache.columns(0).tolist())
    assert columns[0] == columns[1] and 5 not in columns[0][BAD][0]
