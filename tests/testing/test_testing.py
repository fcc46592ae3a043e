"""`kvprune.testing.check`: it lets pass what is right, and names what is wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

import kvprune
from kvprune import KVPruneError, Ranking, TokenPolicy
from kvprune.policies import H2O, StreamingLLM
from kvprune.testing import check, invariants
from kvprune.testing.checking import INVARIANTS

from ..support.strategies import sdtp_pruner


class Newest(TokenPolicy):
    """Keeps the newest six; each policy below breaks it in one way."""

    def rank_slots(self, slots):
        """Columns rank."""
        return Ranking(slots.columns.double(), slots.newest(1), slots.tokens(6))


class OfTheLongestRow(Newest):
    """Its budget depends on other rows."""

    def rank_slots(self, slots):
        """A third of the longest prompt."""
        longest = slots.prompt_length.max().expand_as(slots.first)
        return replace(super().rank_slots(slots), budget=longest // 3 + 2)


class SinksAtColumnZero(Newest):
    """Forgets that a row may begin with padding."""

    def rank_slots(self, slots):
        """The first two columns stay, whatever they are."""
        sinks = slots.valid & (slots.columns < 2)
        return replace(super().rank_slots(slots), protected=sinks | slots.newest(1))


class BySlot(Newest):
    """Takes the order of slots for that of the text."""

    def rank_slots(self, slots):
        """The last ones stay."""
        order = torch.arange(slots.columns.shape[-1]).double().expand_as(slots.columns)
        return replace(super().rank_slots(slots), score=order)


class Counts(Newest):
    """Holds state: it prefers old tokens every other time that it is asked."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def rank_slots(self, slots):
        """Now these, now those."""
        self.asked += 1
        ranking = super().rank_slots(slots)
        return replace(ranking, score=ranking.score * (-1) ** (self.asked // 5))


class WritesUnseen(Newest):
    """Writes into keys past torch's counters."""

    def rank_slots(self, slots):
        """Whatever was there."""
        slots.keys.data[..., 0] = 0
        return super().rank_slots(slots)


class Everywhere(Newest):
    """Does not heed `layers`."""

    def applies(self, layer):
        """Always."""
        return True


class FailsOnOneToken(Newest):
    """Takes for granted that there are many."""

    def rank_slots(self, slots):
        """Looks at the fifth."""
        slots.columns[..., 5]
        return super().rank_slots(slots)


class BudgetThatShrinks(Newest):
    """Promises a budget that does not change."""

    constant_budget = True

    def rank_slots(self, slots):
        """Every third token it is one less."""
        budget = torch.full_like(slots.first, 6 - (slots.seen % 3 == 0))
        return replace(super().rank_slots(slots), budget=budget)


class ProtectsMore(Newest):
    """Promises to protect no more than its budget."""

    constant_budget = True

    def rank_slots(self, slots):
        """Nine."""
        return replace(super().rank_slots(slots), protected=slots.newest(9))


class NotAlike(Newest):
    """Promises that layers are alike."""

    constant_budget = layers_alike = True

    def rank_slots(self, slots):
        """Odd layers keep what is old."""
        ranking = super().rank_slots(slots)
        return replace(ranking, score=ranking.score * (-1) ** slots.layer)


class HeadsApart(H2O):
    """Promises one set for all heads."""

    shares_heads = True


class Gaps(H2O):
    """Promises a window behind sinks."""

    sinks_before_window = 2


@dataclass(frozen=True)
class HiddenByRow(TokenPolicy):
    """Prunes by what is in other rows."""

    def rank_hidden(self, tokens):
        """As many as the shortest row has."""
        least = tokens.length.min().expand_as(tokens.length)
        return Ranking(tokens.columns.double()[:, None], tokens.newest(1), least // 2 + 1)


BROKEN = [
    (OfTheLongestRow(), invariants.rows_are_independent),
    (SinksAtColumnZero(), invariants.rows_are_independent),
    (BySlot(), invariants.slots_have_no_order),
    (HiddenByRow(), invariants.rows_are_independent),
    (Counts(), invariants.reset_is_as_new),
    (WritesUnseen(), invariants.views_are_only_read),
    (Everywhere(), invariants.layers_restrict),
    (FailsOnOneToken(), invariants.keeps_what_it_saw),
    (BudgetThatShrinks(), invariants.promises_are_kept),
    (ProtectsMore(), invariants.promises_are_kept),
    (NotAlike(), invariants.promises_are_kept),
    (HeadsApart(3, 3), invariants.promises_are_kept),
    (Gaps(3, 3), invariants.promises_are_kept),
]


@pytest.mark.parametrize(("policy", "broken"), BROKEN, ids=lambda v: type(v).__name__)
def test_a_policy_that_breaks_an_invariant_is_caught(policy, broken, monkeypatch):
    """The message says which, for what policy and input, what was expected and what was got."""
    title, families = INVARIANTS[broken]
    monkeypatch.setattr("kvprune.testing.checking.INVARIANTS", {broken: (title, families)})
    match = rf"invariant {title} \({broken.__name__}\) does not hold for \[{type(policy).__name__}"
    with pytest.raises(AssertionError, match=match) as caught:
        check(policy, examples=6)
    assert "Case(steps=" in str(caught.value)
    if not isinstance(policy, FailsOnOneToken):
        assert "expected" in str(caught.value) and "got" in str(caught.value)


@pytest.mark.parametrize("policy", [OfTheLongestRow(), BudgetThatShrinks(), Counts()], ids=repr)
def test_all_invariants_together_catch_it_too(policy):
    """By whichever comes first."""
    with pytest.raises(AssertionError, match=r"invariant .* does not hold for"):
        check(policy)


def test_a_budget_that_is_not_what_was_said():
    """The caller's `bound` and `roomy` are held against the policy."""
    with pytest.raises(AssertionError, match=r"3, budgets .*expected 4, got"):
        check(Newest(), bound=4, examples=1)
    with pytest.raises(AssertionError, match="1, a roomy budget is dense"):
        check(Newest(), bound=6, roomy=Newest(), examples=1)


@pytest.mark.parametrize(
    ("policy", "roomy"),
    [
        (Newest(), None),
        ([sdtp_pruner(0.6), StreamingLLM(2, 5)], [sdtp_pruner(1.0), StreamingLLM(2, 500)]),
    ],
    ids=repr,
)
def test_what_is_right_passes(policy, roomy):
    """A policy, and a pipeline."""
    check(policy, roomy=roomy, examples=1)


@pytest.mark.parametrize("wrong", [H2O, "h2o", [3], TokenPolicy()])
def test_what_is_no_policy_is_refused(wrong):
    """As by the cache."""
    with pytest.raises(KVPruneError):
        check(wrong)


class NumberForABudget(TokenPolicy):
    """Answers with an int, as a beginner may."""

    def rank_slots(self, slots):
        score = slots.columns.double()
        return Ranking(score, torch.zeros_like(score, dtype=torch.bool), 4)


class FlatScore(TokenPolicy):
    """Answers without the axis of heads."""

    def rank_slots(self, slots):
        score = slots.columns[:, 0].double()
        budget = torch.full((score.shape[0],), 4)
        return Ranking(score, torch.zeros_like(score, dtype=torch.bool), budget)


@pytest.mark.parametrize("policy", [NumberForABudget(), FlatScore()], ids=repr)
def test_an_answer_that_no_cache_takes_is_refused_in_its_words(policy):
    """Not in those of an invariant, which wraps the policy in one of its own."""
    with pytest.raises(
        KVPruneError, match=rf"^{type(policy).__name__}\(\): expected .* (got|got) "
    ):
        check(policy, examples=1)


def test_it_needs_neither_pytest_nor_hypothesis():
    """And `import kvprune` does not import it; it is there as an attribute all the same."""
    code = """
import sys
sys.modules["pytest"] = sys.modules["hypothesis"] = None
import kvprune
assert "kvprune.testing" not in sys.modules
kvprune.testing.check
from kvprune.testing import check
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_is_public():
    """By name."""
    assert "testing" in kvprune.__all__ and kvprune.testing.check is check
