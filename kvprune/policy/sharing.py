"""One budget for several heads, or for several layers: whose slots are the best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .selection import Ranking, select
from .views import SlotView


def best_of_all(
    score: Tensor, columns: Tensor, free: Tensor, first: Tensor, count: Tensor
) -> Tensor:
    """The best slots of a row, wherever they are.

    Args:
        score: `[B, N]` floats, of all heads' slots one after the other.
        columns: `[B, N]` int64; ties go to the newer column, then to the one that stands in front.
        free: `[B, N]` bool, the slots that can be taken.
        first: `[B, N]` bool, those of them that come first, whatever they score.
        count: `[B]` int64, how many are taken.

    Returns:
        `[B, N]` bool.
    """
    order = columns.argsort(dim=-1, descending=True, stable=True)
    for key in (score, free.byte() + first.byte()):
        step = key.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, step)
    taken = torch.arange(order.shape[-1], device=order.device) < count[:, None]
    return torch.zeros_like(taken).scatter(-1, order, taken)


def best_of_layers(
    layers: Sequence[SlotView],
    scores: Sequence[Tensor],
    stays: Sequence[Tensor],
    budgets: Sequence[Tensor],
) -> list[Ranking]:
    """One ranking of all slots of a row, of all layers and heads, cut where its budget ends.

    Args:
        layers: whose slots.
        scores: for each layer `[B, Hkv, S]` floats; what is NaN comes last.
        stays: for each layer `[B, Hkv, S]` bool, what stays in any case. A head that has nothing of
            that keeps its best slot.
        budgets: for each layer `[B, Hkv]` int64; their sum is the row's.

    Returns:
        the rankings of layers, which keep what the one ranking keeps.
    """
    home, rows = layers[0].columns.device, layers[0].columns.shape[0]
    each = []
    for view, score, stay in zip(layers, scores, stays, strict=True):
        score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        columns, valid = view.columns.expand_as(score), view.valid.expand_as(score)
        stay = valid & stay
        least = (~stay.any(-1)).long()
        best = select(Ranking(score, torch.zeros_like(valid), least), columns, valid)
        each.append((score, columns, valid, stay | (best & valid)))
    score, columns, valid, first = (
        torch.cat([tensor.flatten(1).to(home) for tensor in same], -1)
        for same in zip(*each, strict=True)
    )
    wanted = torch.stack([budget.sum(-1).to(home) for budget in budgets]).sum(0)
    kept = best_of_all(score, columns, valid, first, wanted)
    parts = kept.split([score[0].numel() for score, *_ in each], -1)
    return [
        Ranking(score, first, part.to(score.device).view(rows, *score.shape[1:]).sum(-1))
        for part, score, (_, _, _, first) in zip(parts, scores, each, strict=True)
    ]
