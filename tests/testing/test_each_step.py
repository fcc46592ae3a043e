"""`check_each_step`, as an author of a policy meets it: what it takes, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from kvprune import KVPruneError, TokenPolicy
from kvprune.policies import H2O
from kvprune.policy import Ranking, SlotView
from kvprune.statistics import Attention
from kvprune.testing import DenseOracle, Driver, Oracles, check_each_step

LARGEST = Attention(over="max")
STEPS, PADDING = [20, 5, *[1] * 6], [0, 7]


@dataclass(frozen=True)
class OftenSeen(TokenPolicy):
    """Keeps the slots that have had the most of some query."""

    budget: int
    statistics = (LARGEST,)

    def rank_slots(self, slots: SlotView) -> Ranking:
        score = slots.statistic(LARGEST)
        return Ranking(score, torch.zeros_like(slots.valid), slots.tokens(self.budget))


class OftenSeenOracle(DenseOracle):
    """The same in plain Python; `more` slots too many."""

    def __init__(self, budget: int, more: int = 0) -> None:
        super().__init__()
        self.budget, self.more = budget, more
        self.most: dict[int, float] = {}

    def step(self, *step: Any) -> Any:
        outputs = super().step(*step)
        for j, column in enumerate(self.kept):
            largest = float(self.probabilities[:, :, j].max())
            self.most[column] = max(self.most.get(column, 0.0), largest)
        ranked = sorted(self.kept, key=lambda column: (self.most[column], column))
        keep = ranked[-self.budget - self.more :]
        self.slots = {column: self.slots[column] for column in keep}
        return outputs


class H2OWithoutScores(DenseOracle):
    """Keeps everything, as a budget that is never reached does; says that nothing was received."""

    @property
    def scores(self) -> dict[int, float]:
        return dict.fromkeys(self.kept, 0.0)


class H2OWithOneScore(DenseOracle):
    """Says too little."""

    @property
    def scores(self) -> dict[int, float]:
        return {0: 0.0}


class Misspelt(DenseOracle):
    """An error of its own is not taken for an oracle without scores."""

    @property
    def scores(self) -> dict[int, float]:
        return self.scoress  # type: ignore[attr-defined, no-any-return]


class Blind(DenseOracle):
    """Attends to nothing."""

    def step(self, *step: Any) -> Any:
        return 0 * super().step(*step)


def test_a_policy_with_a_statistic_of_its_own_has_an_oracle():
    """It needs no `scores`, which are those of `Attention()` alone."""
    driver = Driver([OftenSeen(8)], rows=2, heads=4, kv_heads=2)
    check_each_step(driver, Oracles(driver, lambda row: OftenSeenOracle(8)), STEPS, PADDING)


@pytest.mark.parametrize(
    ("policy", "oracle", "said"),
    [
        (OftenSeen(8), lambda row: OftenSeenOracle(8, more=1), "expected the columns .* to stay"),
        (H2O(99, 99), lambda row: H2OWithoutScores(), "expected column 0 to have received 0.0"),
        (H2O(99, 99), lambda row: H2OWithOneScore(), r"expected scores .* got some of \[0\]"),
        (H2O(99, 99), lambda row: Blind(), "outputs: Tensor-likes are not close"),
    ],
)
def test_what_differs_is_said(policy, oracle, said):
    driver = Driver([policy], rows=2, heads=4, kv_heads=2)
    with pytest.raises(AssertionError, match=f"step 0 of 20 tokens, row 0, head 0: {said}"):
        check_each_step(driver, Oracles(driver, oracle), STEPS, PADDING)


def test_an_error_of_an_oracle_is_its_own():
    driver = Driver([H2O(99, 99)], rows=2, heads=4, kv_heads=2)
    with pytest.raises(AttributeError, match="scoress"):
        check_each_step(driver, Oracles(driver, lambda row: Misspelt()), STEPS, PADDING)


@pytest.mark.parametrize(
    ("columns", "shapes", "said"),
    [
        ([0, 1], [(1, 3, 4), (2, 4), (2, 4)], r"for Q = 2 columns, got \[1, 3, 4\]"),
        ([0, 1], [(1, 2, 4), (2, 5), (2, 4)], r"got \[1, 2, 4\], \[2, 5\], \[2, 4\]"),
        ([1, 1], [(1, 2, 4), (2, 4), (2, 4)], "got column 1 behind 1"),
    ],
)
def test_a_step_that_is_none_is_refused(columns, shapes, said):
    oracle = DenseOracle()
    with pytest.raises(KVPruneError, match=said):
        oracle.step(columns, *map(np.zeros, shapes), 1.0)
    assert oracle.kept == []


def test_a_query_that_sees_nothing_is_refused():
    with pytest.raises(KVPruneError, match="dropped too much"):
        DenseOracle().step(
            [0], *map(np.zeros, [(1, 1, 4), (1, 4), (1, 4)]), 1.0, lambda a, b: False
        )
