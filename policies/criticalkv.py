"""CriticalKV (arXiv 2502.03805): half by a policy's scores, the rest also by what values add.

A slot that gets little attention may change the output much, by a large value. So half of the
budget goes by the scores of the policy within, and the rest by `(score + 1e-4) * |W_o v|_1`: W_o is
the part of the output projection that reads the slot's head, v its value, and the norm a sum of
absolute numbers.

Where the sources differ: with grouped queries a key/value head is read by several parts of W_o;
the norm is the mean over these, as in kvpress. Half of a budget is rounded down, and holds what the
policy within protects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.policy import Around, Ranking, SlotView, select

EPSILON = 1e-4
"""So that a slot without attention is still weighed by its value."""

BLOCK = 1024
"""Slots whose outputs are made at once."""


@dataclass(frozen=True, repr=False)
class CriticalKV(Around):
    """Keeps the best slots by score, and of the others those that add most to the output.

    Args:
        base: the policy that scores slots, as SnapKV(0.25): with scores that are not negative.

    Raises:
        KVPruneError: a base that ranks no slots; a model whose attention has no output projection
            that is known.
    """

    layers_alike = False

    def rerank(self, slots: SlotView, ranking: Ranking) -> Ranking:
        """Protects the first half, and scores the others by score and value."""
        half = Ranking(ranking.score, ranking.protected, ranking.budget // 2)
        first = select(half, slots.columns, slots.valid)
        score = (ranking.score + EPSILON) * _added(slots).to(ranking.score.dtype)
        return Ranking(score, first, ranking.budget)


def _added(slots: SlotView) -> Tensor:
    """`|W_o v|_1` of each slot, `[B, Hkv, S]`, the mean over the query heads of its head."""
    weight = slots.output_weight  # [Hkv, G, Dv, C]
    wide = torch.promote_types(slots.values.dtype, torch.float32)
    found = []
    for values in slots.values.split(BLOCK, 2):
        norms = [
            (values.to(wide) @ weight[:, group].to(values.device, wide)).abs().sum(-1)
            for group in range(weight.shape[1])
        ]
        found.append(torch.stack(norms).mean(0))
    return torch.cat(found, -1)
