"""Queries of single tokens, which wait for more before statistics per layer are told of them.

A statistic is told of several at once for little more than of one. Whoever reads what is held sees
none of this: all that waits is joined before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..policy.rotary import Rotary
from ..statistics import Statistic, statistic_dtype
from .rows import RowNumbers

MOST = 32
"""Queries that wait at once, at most: their room is held beside what statistics hold."""


@dataclass(frozen=True, eq=False)
class Told:
    """What a layer's statistics are told of some queries of its rows.

    parts: the statistics that are told.
    queries: `[B, Hq, Q, D]`, as attention is handed them, detached.
    columns: `[B, Q]` int64, -1 for padding.
    positions: `[B, Q]`; None where no statistic reads queries before rotation.
    rotary: the layer's; likewise.
    rows: the rows' numbers.
    """

    parts: tuple[Statistic, ...]
    queries: Tensor
    columns: Tensor
    positions: Tensor | None
    rotary: Rotary | None
    rows: RowNumbers

    def read_by(self, part: Statistic) -> tuple[Tensor, Tensor]:
        """What a statistic is handed; see `Statistic.join`."""
        if part.reads == "queries":
            return self.queries, self.columns
        assert self.positions is not None and self.rotary is not None
        queries = self.queries.to(statistic_dtype(self.queries.dtype))
        angles = self.rotary.angles(-self.positions[:, None], queries)
        numbers = self.rows.numbers_of(self.columns[:, None])[:, 0]
        return self.rotary.turned(queries, *angles), numbers

    def copied(self) -> Told:
        """With queries of its own.

        A model may hand in a slice of something larger, and on a GPU what a CUDA graph writes over.
        """
        queries = self.queries
        alone = queries.untyped_storage().nbytes() == queries.nbytes
        if alone and queries.device.type == "cpu":
            return self
        return replace(self, queries=queries.clone())

    def tensors(self) -> Iterator[Tensor]:
        """What is held while they wait, but for what all layers share."""
        yield self.queries

    def goes_with(self, later: Told) -> bool:
        """Whether both can be told together."""
        mine = self.parts, self.queries.dtype, self.queries.device, self.positions is None
        theirs = later.parts, later.queries.dtype, later.queries.device, later.positions is None
        return mine == theirs and self.rotary is later.rotary and self.rows is later.rows


def together(each: Sequence[Told]) -> Told:
    """All as one, in order."""
    first = each[0]
    if len(each) == 1:
        return first
    positions = [one.positions for one in each if one.positions is not None]
    return replace(
        first,
        queries=torch.cat([one.queries for one in each], 2),
        columns=torch.cat([one.columns for one in each], 1),
        positions=torch.cat(positions, 1) if positions else None,
    )


def may_wait(told: Told) -> bool:
    """Whether queries may wait: single ones, where neither autograd nor a compiler looks on."""
    single = told.queries.shape[2] == 1
    return single and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
