"""Knorm (arXiv 2406.11430): keys with a small L2 norm stay.

Where the sources differ: the paper's code leaves the first two layers alone
(`Knorm(layers=range(2, n))` here), kvpress does not; neither protects newest slots. Norms are taken
in float32: in bfloat16 three of four slots tie.

In the first layer, equal tokens have keys of the same length but for rounding. With keys in
float64 that is rounded away, so that they tie and the newer stays; in less, chance decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvprune.policy import OneBudget, Ranking, SlotView
from kvprune.statistics import statistic_dtype


@dataclass(frozen=True, repr=False)
class Knorm(OneBudget):
    """Keeps the slots with the smallest keys, per key/value head.

    Args:
        budget: what a layer keeps; tokens (int) or a share of the prompt (float).
        when: see `TokenPolicy`; by default at the end of each prompt.
        layers: the layers that the policy works on; None for all.

    Raises:
        KVPruneError: a budget that is not positive, NaN or, as a float, above 1.0.
    """

    when: int | str | None = field(default="prompt", kw_only=True)

    constant_budget = True

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Ranks slots by the norms of their keys."""
        dtype = statistic_dtype(slots.keys.dtype)
        score = -torch.linalg.vector_norm(slots.keys, dim=-1, dtype=dtype).float()
        return Ranking(score, torch.zeros_like(slots.valid), slots.tokens(self.budget))
