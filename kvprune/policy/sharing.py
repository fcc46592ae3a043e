"""One budget for several heads, or for several layers: whose slots are the best."""

from __future__ import annotations

import torch
from torch import Tensor


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
