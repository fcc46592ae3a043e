"""A statistic that counts how far apart tokens are, in rows with padding between their turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import kvprune
from kvprune.policies import SnapKV
from kvprune.statistics import Block, Statistic

from ..support.models import LAYERS, prompt, tiny_model


@dataclass(frozen=True)
class FromAfar(Statistic):
    """The most that a slot had of a query at least so many tokens behind it."""

    distance: int
    reads: ClassVar[str] = "probabilities"

    def join(self, held: Tensor, new: Block) -> Tensor:
        apart = new.positions[:, None, :, None] - new.slot_positions[:, :, None]
        given = new.probabilities.amax(2) * (apart >= self.distance)
        return torch.maximum(held, given.amax(2).to(held.dtype))


FAR = FromAfar(3)


@dataclass(frozen=True)
class LongSeen(kvprune.TokenPolicy):
    """Keeps what was seen from afar, and the newest."""

    budget: int
    statistics = (FAR,)

    def rank_slots(self, slots: kvprune.policy.SlotView) -> kvprune.Ranking:
        return kvprune.Ranking(slots.statistic(FAR), slots.newest(3), slots.tokens(self.budget))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@torch.no_grad()
def test_a_row_that_paused_counts_as_it_does_alone(backend):
    """In chunks, in single tokens, and beside a policy that has queries looked at."""
    model = tiny_model(attn_implementation=backend)
    first, later = prompt(1, 9), prompt(1, 6, 1)
    alone = kvprune.ComposedCache([LongSeen(8)], observe=SnapKV(4, window=2, kernel=1).statistics)
    batch = kvprune.ComposedCache([LongSeen(8)])
    kvprune.read(model, alone, first)
    kvprune.read(model, batch, first.repeat(2, 1))
    pause = torch.zeros(1, 4, dtype=torch.long)
    turn = torch.cat([pause, later[:, :5]], 1)
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[1, 9:13] = 0
    kvprune.read(model, alone, later[:, :5])
    kvprune.read(model, batch, torch.cat([prompt(1, 9, 2), turn]), mask)
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    kvprune.read(model, alone, later[:, 5:])
    kvprune.read(model, batch, later[:, 5:].repeat(2, 1), mask)
    for layer in range(LAYERS):
        expected = alone.columns(layer)[0]
        got = batch.columns(layer)[1]
        # The columns of the pause are counted as columns, and not as tokens.
        assert torch.equal(torch.where(got >= 13, got - 4, got), expected)
