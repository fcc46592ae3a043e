"""How far a token came through the pruning of hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Statistic


@dataclass(frozen=True)
class Survival(Statistic):
    """The stages of pruning that a slot's token survived, and its rank in the last, `[B, Hkv, S]`.

    Every time that a policy ranks hidden states is a stage, from 0. A token that was last judged in
    stage s has s plus its share of the rank there, in [0, 1) among the tokens of its row in that
    forward, and 1 more if it stayed: the longer it stayed and the better it was scored, the larger.
    Tokens that were never judged, as those that were generated, have +inf.

    It is known when the forward ends: in `rank_layers`, in what stands behind such a policy, and in
    later forwards. A union that prunes, whose parts judge apart, is refused beside it.
    """

    reads: ClassVar[str] = "survival"
    start: ClassVar[float] = float("inf")
    checked: ClassVar[bool] = False

    def join(self, held: Tensor, new: Tensor) -> Tensor:
        """Takes the new numbers, where there are any (elsewhere they are NaN)."""
        return torch.where(new.isnan(), held, new)
