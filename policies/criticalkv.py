"""CriticalKV (arXiv 2502.03805): half by a policy's scores, the rest also by what values add.

A slot that gets little attention may change the output much, by a large value. So half of the
budget goes by the scores of the policy within, and the rest by `(score + 1e-4) * |W_o v|_1`: W_o is
the part of the output projection that reads the slot's head, v its value, and the norm a sum of
absolute numbers.

Where the sources differ: with grouped queries a key/value head is read by several parts of W_o;
the norm is the mean over these, as in kvpress. Half of a budget is rounded down, and holds what the
policy within protects. Around it, AdaKV shares out the second half alone; around AdaKV, both halves
are of the budget that a head has there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.policy import Around, Ranking, SlotView, select

EPSILON = 1e-4
"""So that a slot without attention is still weighed by its value."""

NUMBERS = 1 << 20
"""Numbers of outputs that are made at once, for all rows and heads together."""


@dataclass(frozen=True, repr=False)
class CriticalKV(Around):
    """Keeps the best slots by score, and of the others those that add most to the output.

    Args:
        base: the policy that scores slots, as SnapKV(0.25).

    Raises:
        KVPruneError: a base that ranks no slots; a model whose attention has no output projection
            that is known.
    """

    layers_alike = False

    def rerank(self, slots: SlotView, ranking: Ranking) -> Ranking:
        """Protects the first half, and scores the others by score and value."""
        half = Ranking(ranking.score, ranking.protected, ranking.budget // 2)
        first = select(half, slots.columns, slots.valid)
        # Where scores are negative, as those of Knorm, the lowest of a head counts as 0. Some are
        # infinite: those of SnapKV's window, which stays in any case.
        known = slots.valid & ranking.score.isfinite()
        lowest = ranking.score.masked_fill(~known, 0).amin(-1, keepdim=True).clamp(max=0)
        weighed = (ranking.score - lowest + EPSILON) * _added(slots).to(ranking.score.dtype)
        return Ranking(torch.where(known, weighed, ranking.score), first, ranking.budget)


def _added(slots: SlotView) -> Tensor:
    """`|W_o v|_1` of each slot, `[B, Hkv, S]`, the mean over the query heads of its head."""
    weight, values = slots.output_weight, slots.values  # [Hkv, G, Dv, C], [B, Hkv, S, Dv]
    wide = torch.promote_types(values.dtype, torch.float32)
    rows, heads, size, _ = values.shape
    block = max(1, NUMBERS // (rows * heads * weight.shape[-1]))
    norms = values.new_zeros((rows, heads, size), dtype=wide)
    for group in range(weight.shape[1]):
        mine = weight[:, group].to(values.device, wide)
        for norm, some in zip(norms.split(block, 2), values.split(block, 2), strict=True):
            # Not by `vector_norm`, which takes almost as long as the product.
            norm += (some.to(wide) @ mine).abs_().sum(-1)
    return norms / weight.shape[1]
