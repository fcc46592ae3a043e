"""TOVA (arXiv 2401.06104): Token Omission Via Attention.

In every step, each layer keeps the slots that the newest query gives most to, as the mean over all
heads: one set for all heads of a layer. Nothing is protected, not even the newest slot. Where a
policy before it has left heads with different tokens, a token's score is the same mean, and a head
that does not hold it gives it nothing.

Where the sources differ: the paper's code and this one evict in the prompt's forward as well, by
the prompt's last query; kvpress forces the newest slot in, and evicts after the prompt alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        score = slots.statistic(_NEWEST)
        if slots.columns.shape[1] == 1:
            score = score.mean(1, keepdim=True)
        else:
            score = _mean_by_column(score, slots.columns)
        nothing = torch.zeros_like(score, dtype=torch.bool)
        return Ranking(score, nothing, slots.tokens(self.budget))


def _mean_by_column(score: Tensor, columns: Tensor) -> Tensor:
    """The mean over heads of what each column has, `[B, Hkv, S]`; 0 where a head lacks it."""
    ordered, order = columns.sort(dim=-1)
    in_order, total = score.gather(-1, order), torch.zeros_like(score)
    for head in range(score.shape[1]):
        known, mine = (
            t[:, head : head + 1].expand_as(columns).contiguous() for t in (ordered, in_order)
        )
        at = torch.searchsorted(known, columns).clamp(max=columns.shape[-1] - 1)
        total += mine.gather(-1, at).masked_fill(known.gather(-1, at) != columns, 0)
    return total / score.shape[1]
