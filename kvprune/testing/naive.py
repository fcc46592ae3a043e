"""Naive versions, entry by entry, of the functions that the engine has fast."""

from __future__ import annotations

import torch
from torch import Tensor

from ..policy.selection import Ranking


def naive_select(ranking: Ranking, columns: Tensor, asked: Tensor | None = None) -> Tensor:
    """`kvprune.policy.selection.select`, one entry at a time.

    Args:
        ranking: the ranking.
        columns: `[B, 1|H, S]`, -1 where not valid.
        asked: `[B, 1, S]` bool, entries that are protected on top; None for none.

    Returns:
        `[B, H, S]` bool.
    """
    rows, _, size = columns.shape
    budget = ranking.budget.reshape(rows, -1)
    heads = max(t.shape[1] for t in (columns, ranking.score, ranking.protected, budget))
    kept = torch.zeros(rows, heads, size, dtype=torch.bool)
    for row in range(rows):
        for head in range(heads):
            at = [t[row, min(head, t.shape[1] - 1)] for t in (columns, ranking.score)]
            guarded = ranking.protected[row, min(head, ranking.protected.shape[1] - 1)].clone()
            if asked is not None:
                guarded |= asked[row, 0]
            present = [i for i in range(size) if at[0][i] >= 0]
            order = sorted(
                present, key=lambda i: (bool(guarded[i]), float(at[1][i]), int(at[0][i]))
            )
            allowed = int(budget[row, min(head, budget.shape[1] - 1)])
            allowed = max(allowed, sum(bool(guarded[i]) for i in present))
            for i in order[::-1][:allowed]:
                kept[row, head, i] = True
    return kept
