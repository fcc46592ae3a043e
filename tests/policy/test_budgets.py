"""Policies at another budget: what a layer keeps in all."""

from __future__ import annotations

from fractions import Fraction
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune import KVPruneError
from kvprune.policies import H2O, SDTP, SnapKV, StreamingLLM

from ..support.models import prompt, tiny_model
from ..support.strategies import POLICIES, listed

shares = st.sampled_from([0.05, 0.1, 0.125, 0.2, 0.25, 0.5, 0.75, 1.0])


def slots(policies: list[kvprune.TokenPolicy], length: int) -> float:
    """How many slots a layer holds of a prompt, as the mean over the layers."""
    cache = kvprune.ComposedCache(policies)
    with torch.no_grad():
        tiny_model()(prompt(1, length), past_key_values=cache, logits_to_keep=1)
    return fmean(cache.columns(layer).shape[-1] for layer in range(len(cache)))


BUDGETS = {
    "h2o": (H2O(0.1, 0.3), H2O(0.125, 0.375)),
    "tokens": (H2O(30, 10), H2O(0.375, 0.125)),
    "no heavy": (H2O(0, 10), H2O(0.0, 0.5)),
    "mixed": (H2O(30, 0.5), H2O(0.25, 0.25)),
    "layers": (H2O(0.1, 0.1, layers=[1]), H2O(0.25, 0.25, layers=[1])),
    "streaming": (StreamingLLM(3, 7, "cache"), StreamingLLM(3, 0.5, "cache")),
    "union": (H2O() | StreamingLLM(), H2O(0.125, 0.125) | StreamingLLM(4, 0.25)),
    "sdtp": (SDTP(), None),
    "sdtp union": (SDTP() | SDTP(sinks=1), None),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_half_of_the_prompt(name):
    """In the proportion of the parts; a policy without a budget says so."""
    policy, expected = BUDGETS[name]
    assert policy.with_budget(0.5) == expected


@given(listed, shares, st.integers(20, 60))
def test_a_layer_keeps_the_share(policy, share, length):
    """Of any prompt, within the rounding of each part and StreamingLLM's sinks."""
    made = policy.make(8)
    smaller = made.with_budget(share)
    assert (smaller is None) == (policy.bound is None or not policy.budgeted)
    if smaller is None or not policy.even:
        return
    parts = getattr(smaller, "parts", (smaller,))
    sinks = sum(p.sinks for p in parts if isinstance(p, StreamingLLM))
    kept = slots([smaller], length)
    if len(parts) > 1:
        # What both keep is kept once.
        assert kept <= share * length + len(parts) + sinks
    else:
        # The window of SnapKV stays whatever the budget.
        least = smaller.window if isinstance(smaller, SnapKV) else 0
        expected = min(length, max(share * length + sinks, least))
        assert abs(kept - expected) <= 1 + sinks * (share == 1.0)


@given(shares, st.integers(1, 99), st.integers(0, 99))
def test_the_parts_add_up_exactly(share, recent, heavy):
    """As decimals: a fifth, halved, is a tenth."""
    policy = H2O(heavy, recent).with_budget(share)
    assert abs(Fraction(policy.heavy) + Fraction(policy.recent) - Fraction(share)) < 1e-15
    assert H2O(0.5, 0.5).with_budget(0.2) == H2O(0.1, 0.1)


@pytest.mark.parametrize("share", [0, 1, 0.0, 1.5, -0.1, float("nan"), "0.5", None, True])
@pytest.mark.parametrize("policy", [H2O(), StreamingLLM(), H2O() | H2O()], ids=repr)
def test_what_is_no_share_is_refused(policy, share):
    """An int is not a share."""
    with pytest.raises(KVPruneError, match=r"with_budget.*share of the prompt"):
        policy.with_budget(share)


def test_fixed_budgets_are_what_a_long_prompt_leaves():
    """Whatever its length; 0 for shares and for what has no budget."""
    for policy in (H2O(3, 4), H2O(0, 4), StreamingLLM(2, 7), StreamingLLM(2, 7, "cache")):
        assert policy.fixed_budget == slots([policy], 40) == slots([policy], 50)
    assert H2O(0.1, 0.1).fixed_budget == StreamingLLM(4, 0.5).fixed_budget == 0
    assert SDTP().fixed_budget == 0
    assert {p.name for p in POLICIES if p.make(9).fixed_budget} == {
        p.name for p in POLICIES if p.bound and p.budgeted and "|" not in p.name
    }
