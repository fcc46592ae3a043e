"""TOVA (arXiv 2401.06104): Token Omission Via Attention.

In every step, each layer keeps the slots that the newest query gives most to, as the mean over all
heads: one set for all heads of a layer. Nothing is protected, not even the newest slot.

Where the sources differ: the paper's code and this one evict in the prompt's forward as well, by
the prompt's last query; kvpress forces the newest slot in, and evicts after the prompt alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune.policy import OneBudget, Ranking, SlotView
from kvprune.statistics import Attention

_NEWEST = Attention(decay=0.0)


@dataclass(frozen=True, repr=False)
class TOVA(OneBudget):
    """Keeps what the newest query looks at.

    Args:
        budget: what a layer keeps; tokens (int) or a share of the prompt (float).
        when: see `TokenPolicy`; by default in every forward.
        layers: the layers that the policy works on; None for all.

    Raises:
        KVPruneError: a budget that is not positive, NaN or, as a float, above 1.0.
    """

    statistics = (_NEWEST,)
    shares_heads = True
    constant_budget = True
    layers_alike = True

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Ranks slots by the newest query's probabilities."""
        score = slots.statistic(_NEWEST).mean(1, keepdim=True)
        return Ranking(score, torch.zeros_like(slots.valid[:, :1]), slots.tokens(self.budget))
