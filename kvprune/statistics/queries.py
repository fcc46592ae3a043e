"""The newest queries of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import KVPruneError
from .base import Statistic


@dataclass(frozen=True)
class Queries(Statistic):
    """The newest `count` queries of each row, rotated as attention is handed them.

    With positions inside the cache they are held as if their tokens stood at position 0, and looks
    turn them to where these stand when they are asked.

    A pair: queries `[B, Hq, w, D]` and their columns `[B, w]` int64, in order; w is `count`, or
    less where fewer were read. A row that has fewer than others has columns of -1 in front.
    `slots.looks(count)` says what they give to the slots that are held when it is asked.

    Args:
        count: how many, at least 1.

    Raises:
        KVPruneError: not a whole number of at least 1.
    """

    count: int

    per: ClassVar[str] = "layer"
    reads: ClassVar[str] = "queries"
    checked: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise KVPruneError(
                f"Queries({self.count!r}): expected a whole number of queries, at least 1"
            )

    def join(self, held: tuple[Tensor, ...], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The newest of both together."""
        queries, columns = new
        if held:
            queries = torch.cat([held[0].to(queries.dtype), queries], 2)
            columns = torch.cat([held[1], columns], 1)
        # Padding, which may be behind a row's tokens, goes to the front.
        columns, order = columns.sort(dim=-1, stable=True)
        columns, order = columns[:, -self.count :], order[:, -self.count :]
        index = order[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        # Copies: a slice would keep the queries of the whole forward.
        return queries.gather(2, index), columns.clone()
