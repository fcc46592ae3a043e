"""How far the tokens of a forward came through the stages of pruning; see `Survival`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..statistics import statistic_dtype
from ..storage.layer import SlotLayer


class Judged:
    """The judgements of one forward's tokens.

    Args:
        seen: columns before the forward; the tokens have the next ones.
        count: its tokens.
    """

    def __init__(self, seen: int, count: int) -> None:
        self._seen, self._count, self._stage = seen, count, 0
        # `[B, count + 1]`; the last place takes what is of no token.
        self._numbers: Tensor | None = None

    def judge(self, score: Tensor, valid: Tensor, kept: Tensor, columns: Tensor) -> None:
        """Takes down one stage.

        Args:
            score: `[B, Q']` floats, of the tokens that were still there, in the order of columns.
            valid: the same shape, bool, which of them were judged.
            kept: likewise, which of them stayed.
            columns: `[B, Q']` int64.
        """
        dtype = statistic_dtype(score.dtype)
        # From the worst to the best, behind what is not valid; ties go to the newer column.
        order = score.argsort(dim=-1, stable=True)
        order = order.gather(-1, valid.gather(-1, order).byte().argsort(dim=-1, stable=True))
        places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, places)
        total = valid.sum(-1, keepdim=True)
        share = (rank - (order.shape[-1] - total)).to(dtype) / total.clamp(min=1)
        numbers = self._numbers
        if numbers is None:
            numbers = share.new_full((score.shape[0], self._count + 1), torch.inf)
        where = torch.where(valid, columns - self._seen, self._count)
        self._numbers = numbers.to(where.device).scatter(-1, where, self._stage + kept + share)
        self._stage += 1

    def tell(self, layers: Iterable[SlotLayer]) -> None:
        """Hands all that was judged to the layers that keep it."""
        if self._numbers is None:
            return
        for slots in layers:
            for part in slots.parts:
                if part.reads == "survival" and slots.is_initialized:
                    numbers = self._numbers[:, None, : self._count].to(slots.device)
                    columns = torch.arange(self._count, device=slots.device) + self._seen
                    each = columns.expand(numbers.shape[0], -1)
                    slots.observe_tokens(part, numbers.to(statistic_dtype(slots.dtype)), each)
