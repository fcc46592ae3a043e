"""Policies under which heads keep different numbers of slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import kvprune
from kvprune.statistics import Attention


@dataclass(frozen=True)
class Threshold(kvprune.TokenPolicy):
    """Each head keeps what has received so much attention, and its newest slots.

    least: the sum of attention from which on a slot stays.
    recent: how many of the newest slots stay in any case.
    """

    least: float
    recent: int = 1
    statistics = (Attention(),)

    def rank_slots(self, slots):
        """See `TokenPolicy.rank_slots`."""
        score = slots.statistic(Attention())
        columns = slots.columns.expand_as(score)
        newest = columns.sort(-1).values[..., -self.recent :][..., :1]
        stays = (score >= self.least) | (columns >= newest)
        none = torch.zeros_like(score[:, 0, 0], dtype=torch.long)
        return kvprune.Ranking(score, stays & (columns >= 0), none)


@dataclass(frozen=True)
class FirstHead(kvprune.TokenPolicy):
    """The first head keeps everything, the others the newest slots alone."""

    recent: int

    def rank_slots(self, slots):
        """See `TokenPolicy.rank_slots`."""
        columns = slots.columns.expand(-1, slots.heads, -1)
        stays = columns >= slots.seen - self.recent
        stays[:, 0] = True
        none = torch.zeros_like(columns[:, 0, 0])
        return kvprune.Ranking(columns.double(), stays & (columns >= 0), none)


@dataclass(frozen=True)
class Budgets(kvprune.TokenPolicy):
    """Each head has a budget of its own, of its newest slots.

    each: by head.
    """

    each: tuple[int, ...]

    def rank_slots(self, slots):
        """See `TokenPolicy.rank_slots`."""
        columns = slots.columns.expand(-1, slots.heads, -1)
        budget = torch.tensor(self.each).expand(columns.shape[0], -1)
        return kvprune.Ranking(
            columns.double(), torch.zeros_like(columns, dtype=torch.bool), budget
        )
