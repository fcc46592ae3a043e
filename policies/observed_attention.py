"""ObservedAttention: slots that have received the most attention by each query that could see them.

The score is the mean of the softmax probabilities over all queries that could see the slot (those
that were pruned before a layer did not), added up over the query heads of a key/value head. H2O
(arXiv 2306.14048) has the sum instead, in every step, and a window of newest slots. kvpress has the
same mean, from eager attention over the whole prompt; here nothing n x n is held.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvprune.policy import OneBudget, Ranking, SlotView
from kvprune.statistics import Attention

_MEAN = Attention(over="mean")


@dataclass(frozen=True, repr=False)
class ObservedAttention(OneBudget):
    """Keeps the slots with the largest mean attention, per key/value head.

    Args:
        budget: what a layer keeps; tokens (int) or a share of the prompt (float).
        when: see `TokenPolicy`; by default at the end of each prompt.
        layers: the layers that the policy works on; None for all.

    Raises:
        KVPruneError: a budget that is not positive, NaN or, as a float, above 1.0.
    """

    when: int | str | None = field(default="prompt", kw_only=True)

    statistics = (_MEAN,)
    constant_budget = True
    layers_alike = True

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Ranks slots by their mean attention."""
        score = slots.statistic(_MEAN)
        return Ranking(score, torch.zeros_like(slots.valid), slots.tokens(self.budget))
