"""The mean and the covariance of a layer's queries before rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import KVPruneError
from .base import Statistic


@dataclass(frozen=True)
class QueryMoments(Statistic):
    """The moments of a row's queries before rotation, since its prompt began.

    A pair: mean `[B, Hq, D]` and covariance `[B, Hq, D, D]` (divided by the number of queries); 0
    where there was none. Of the queries that reached the layer: some may have been pruned.

    Args:
        skip: how many of a row's first tokens do not count, as they are unlike all others.

    Raises:
        KVPruneError: not a whole number of at least 0.

    Source: Expected Attention (arXiv 2510.00636, section 3). What is held is exact whatever the
    pieces in which a prompt is read: count, mean, and squared deviations added up (Chan et al.
    1979).
    """

    skip: int = 4

    per: ClassVar[str] = "layer"
    reads: ClassVar[str] = "unrotated"
    checked: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if type(self.skip) is not int or self.skip < 0:
            raise KVPruneError(
                f"QueryMoments({self.skip!r}): expected a whole number of tokens, at least 0"
            )

    def join(
        self, held: tuple[Tensor, ...], new: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Count `[B]`, mean and squared deviations `[B, Hq, D, D]` of both together."""
        queries, numbers = new
        there = numbers >= self.skip
        count = there.sum(-1).to(queries.dtype)
        # A matrix product would spread what is not finite in a query of padding.
        queries = queries.masked_fill(~there[:, None, :, None], 0)
        mean = queries.sum(2) / _per_row(count.clamp(min=1), 3)
        if held:
            before, mean_before, squares_before = (t.to(queries.dtype) for t in held)
            total = before + count
            share = count / total.clamp(min=1)
            apart = mean - mean_before
            weighted = apart * _per_row(before * share, 3)
            # One pass: in decoding it is most of what is done.
            squares = torch.baddbmm(
                squares_before.flatten(0, 1),
                weighted.flatten(0, 1)[:, :, None],
                apart.flatten(0, 1)[:, None],
            ).view_as(squares_before)
            known = total, mean_before + apart * _per_row(share, 3), squares
        else:
            size = mean.shape[-1]
            known = count, mean, mean.new_zeros(*mean.shape, size)
        if queries.shape[2] > 1:
            # In place: the queries are a copy, and large tensors made anew cost more than the sums.
            away = queries.sub_(mean[:, :, None]).mul_(there[:, None, :, None])
            known[2].add_(away.transpose(-1, -2) @ away)
        return known

    def value(self, *held: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Mean and covariance."""
        count, mean, squares = held[0]
        return mean, squares / _per_row(count.clamp(min=1), 4)


@dataclass(frozen=True)
class Rotations(Statistic):
    """Nothing is observed: a policy that names it may ask for the rotations of a layer.

    These are `slots.rotary`, `slots.position` and `slots.scaling`.
    """

    per: ClassVar[str] = "layer"
    reads: ClassVar[str] = "rotations"

    def join(self, held: tuple[Tensor, ...], new: Any) -> tuple[Tensor, ...]:
        """Is not asked."""
        return held


def _per_row(numbers: Tensor, axes: int) -> Tensor:
    """A number of each row `[B]`, for what has so many axes."""
    return numbers.view(-1, *(1,) * (axes - 1))
