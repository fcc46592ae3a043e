"""DMS's rule (arXiv 2506.05345): what scores below a threshold goes, once a window has passed.

A policy within says what each slot is worth: a gate that was trained for it, or any other score.
The newest `window` slots stay; of the older ones those that score at least the threshold. There is
no budget: how much stays follows from the text, in each layer and head by itself.

Where the sources differ:

* The paper trains neurons of the model itself to say which token goes, and they decide when the
  token is written. A gate gives its number then, too, and the number does not change; other scores
  may change while the token is in the window.
* kvpress masks what goes; here memory is freed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvprune.errors import KVPruneError
from kvprune.policy import Around, Budget, Ranking, SlotView


@dataclass(frozen=True, repr=False)
class DMS(Around):
    """Drops what scores below a threshold, a window later.

    It is asked whenever the policy within is. For a decision in every step, give that policy
    `when=None`.

    Args:
        base: the policy that scores slots; its budget is not read, what it protects stays.
        threshold: the least score that stays.
        window: how many of the newest slots stay in any case; tokens (int) or a share of the prompt
            (float).

    Raises:
        KVPruneError: a threshold that is no number, a window that is not positive, or a base that
            ranks no slots.
    """

    threshold: float
    window: int | float = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        Budget(self.window, "DMS: window")
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or math.isnan(self.threshold):
            raise KVPruneError(f"DMS: threshold={self.threshold!r}: expected a number")

    def rerank(self, slots: SlotView, ranking: Ranking) -> Ranking:
        """Protects what stays, and drops the rest."""
        stays = ranking.protected | slots.newest(self.window) | (ranking.score >= self.threshold)
        stays = slots.valid & stays
        nothing = torch.zeros_like(ranking.budget)
        return Ranking(ranking.score, stays, nothing)

    def with_budget(self, share: float) -> None:
        """None: a threshold is no budget."""
        return

    @property
    def fixed_budget(self) -> int:
        """0: how much stays follows from the text."""
        return 0
