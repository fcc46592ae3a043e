"""Scores that are pooled over neighbours, as observation windows are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import KVPruneError

POOLINGS = ("max", "average")


def check_kernel(kernel: Any, pooling: Any, policy: str) -> None:
    """Refuses what `pooled` does not know.

    Raises:
        KVPruneError: a kernel that is not an odd number of at least 1, or another pooling; the
            policy is in the message.
    """
    if type(kernel) is not int or kernel < 1 or kernel % 2 == 0:
        raise KVPruneError(
            f"{policy}: kernel={kernel!r}: expected an odd number of neighbours, at least 1, so "
            f"that a token is in the middle of its own"
        )
    if pooling not in POOLINGS:
        raise KVPruneError(f"{policy}: pooling={pooling!r}: expected 'max' or 'average'")


def pooled(score: Tensor, order: Tensor, there: Tensor, kernel: int, pooling: str) -> Tensor:
    """The score of each slot from those of its neighbours.

    Neighbours are the `kernel` slots around it, by column, among those that are there.

    Args:
        score: `[B, H, G, S]` float, in the order of slots.
        order: `[B, 1|H, S]` int64, slots by column; those that are not there may be anywhere at the
            two ends, but not among the others.
        there: `[B, 1|H, S]` bool, slots that have a score.
        kernel: how many neighbours, an odd number.
        pooling: "max", or "average" (the sum over `kernel`, also where there are fewer).

    Returns:
        `[B, H, G, S]`, in the order of slots; what stands at slots that are not there means
        nothing.
    """
    neutral = -torch.inf if pooling == "max" else 0.0
    index = order[:, :, None].expand(-1, score.shape[1], score.shape[2], -1)
    in_order = score.masked_fill(~there[:, :, None], neutral).gather(-1, index)
    flat, half = in_order.flatten(0, 2)[:, None], kernel // 2
    if pooling == "max":
        found = torch.nn.functional.max_pool1d(flat, kernel, 1, half)
    else:
        found = torch.nn.functional.avg_pool1d(flat, kernel, 1, half)
    return torch.empty_like(score).scatter(-1, index, found.view_as(score))
