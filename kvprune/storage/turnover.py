"""Decoding at a full budget: in each step one slot goes, and the next token takes its place.

Layers that are alike do so together; see `kvprune.storage.group`, and `kvprune.engine.turnover` for
who says what goes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor


class Stage(Enum):
    """Where the next single token of a layer goes."""

    BEHIND = "behind the slots in use"
    FREE = "into the free slot of its row and head"
    TAKEN = "into the free slot, which has all of the token but keys, values and position"


@dataclass(frozen=True, eq=False)
class Turnover:
    """A layer between two tokens.

    stage: where the next single token goes.
    slot: `[B, 1|Hkv, 1]` int64, an empty slot of every row and head; None at the stage BEHIND.
    policy: the number of the policy whose budget is full in every row and head, since when only
        single tokens came; None where that is not known.
    """

    stage: Stage = Stage.BEHIND
    slot: Tensor | None = None
    policy: int | None = None

    def freed(self, slot: Tensor | None, policy: int | None) -> Turnover:
        """After an eviction by that policy, which left a free slot or none."""
        return Turnover(Stage.BEHIND if slot is None else Stage.FREE, slot, policy)

    def taken(self) -> Turnover:
        """After the next token's column was written to the free slot."""
        return Turnover(Stage.TAKEN, self.slot, self.policy)

    def stored(self, single: bool) -> Turnover:
        """After new tokens were stored: a single one, no padding, in every row, or others."""
        return Turnover(policy=self.policy if single else None)

    def select_rows(self, rows: Tensor) -> Turnover:
        """Row i becomes what row `rows[i]` was."""
        return self if self.slot is None else replace(self, slot=self.slot.index_select(0, rows))
