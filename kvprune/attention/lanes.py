"""Lanes: the rows of a layer, or the heads of its rows, that keep different numbers of slots.

A layer whose lanes keep about as many slots is one rectangle `[B, Hkv, S]`. Where they part ways,
it is several, each of the lanes that keep about as many. Here is how tensors of a whole layer are
cut for its rectangles, and put together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .masks import Mask


@dataclass(frozen=True, eq=False)
class Lanes:
    """Which lanes of a layer stand in which of its rectangles.

    rows: B, of the layer.
    heads: the key/value heads that are stored, Hkv.
    by_head: a lane is one head of a row; else it is a row, with all its heads.
    numbers: by rectangle, its lanes, ascending: rows, or `row * heads + head`.
    device: where the layer is.
    """

    rows: int
    heads: int
    by_head: bool
    numbers: tuple[tuple[int, ...], ...]
    device: torch.device
    # `numbers` as tensors, and the place of every lane among all of them.
    _each: tuple[Tensor, ...] = field(init=False, repr=False)
    _places: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        each = tuple(torch.tensor(numbers, device=self.device) for numbers in self.numbers)
        object.__setattr__(self, "_each", each)
        object.__setattr__(self, "_places", torch.cat(each).argsort())

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held, for counting bytes."""
        return (*self._each, self._places)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """`[B, 1|Hkv, ...]` for each rectangle: `[N, 1|Hkv, ...]`, by head `[N, 1, ...]`."""
        if self.by_head:
            tensor = tensor.expand(-1, self.heads, *tensor.shape[2:])
            tensor = tensor.reshape(-1, 1, *tensor.shape[2:])
        return [tensor.index_select(0, lanes) for lanes in self._each]

    def split_queries(self, query: Tensor) -> list[Tensor]:
        """`[B, Hq, Q, D]` for each rectangle: the query heads that read its lanes."""
        if self.by_head:
            query = query.reshape(-1, query.shape[1] // self.heads, *query.shape[2:])
        return [query.index_select(0, lanes) for lanes in self._each]

    def rows_of(self) -> list[Tensor]:
        """The row of each lane, by rectangle, `[N]` int64."""
        return [lanes // self.heads if self.by_head else lanes for lanes in self._each]

    def selected(self, rows: Sequence[int]) -> tuple[Lanes, list[list[int]]]:
        """The lanes once row i is what row `rows[i]` was.

        Returns:
            the lanes, without rectangles that nothing is left of; and by rectangle of today, the
            places of the lanes that it then has, among those of today.
        """
        width = self.heads if self.by_head else 1
        numbers, places = [], []
        for lanes in self.numbers:
            place = {lane: i for i, lane in enumerate(lanes)}
            wanted = [
                (i * width + head, row * width + head)
                for i, row in enumerate(rows)
                for head in range(width)
            ]
            here = [(new, place[old]) for new, old in wanted if old in place]
            numbers.append(tuple(new for new, _ in here))
            places.append([at for _, at in here])
        left = tuple(lanes for lanes in numbers if lanes)
        return Lanes(len(rows), self.heads, self.by_head, left, self.device), places

    def join(self, tensors: Sequence[Tensor], fill: float, axis: int = 2) -> Tensor:
        """Puts together what each rectangle has for its slots.

        A rectangle's slots are the last ones, so that new tokens' are the last ones everywhere.

        Args:
            tensors: by rectangle, `[N, 1|Hkv, ..., S', ...]`, by head `[N, 1, ..., S', ...]`.
            fill: stands for slots that a lane does not have.
            axis: that of the slots.

        Returns:
            `[B, 1|Hkv, ..., S, ...]`, S the most slots that a rectangle has.
        """
        size = max(tensor.shape[axis] for tensor in tensors)
        whole = torch.cat([_right_aligned(tensor, size, fill, axis) for tensor in tensors])
        whole = whole.index_select(0, self._places)
        return whole.view(self.rows, self.heads, *whole.shape[2:]) if self.by_head else whole

    def join_outputs(self, outputs: Sequence[Tensor]) -> Tensor:
        """Outputs `[N, Q, heads, Dv]` of each rectangle's query heads: `[B, Q, Hq, Dv]`."""
        whole = torch.cat(list(outputs)).index_select(0, self._places)
        if not self.by_head:
            return whole
        apart = whole.unflatten(0, (self.rows, self.heads)).transpose(1, 2)
        return apart.flatten(2, 3)


def _right_aligned(tensor: Tensor, size: int, fill: float, axis: int) -> Tensor:
    missing = size - tensor.shape[axis]
    if not missing:
        return tensor
    behind = (0, 0) * (tensor.dim() - axis - 1)
    return torch.nn.functional.pad(tensor, (*behind, missing, 0), value=fill)


class LaneMask:
    """A rule for the lanes of a rectangle.

    Args:
        mask: the rule of the layer, the same for all heads where a lane is a head.
        rows: `[N]` int64, the row of each lane.
    """

    def __init__(self, mask: Mask, rows: Tensor) -> None:
        self._mask, self._rows = mask, rows
        self.plainly_causal, self.stock = mask.plainly_causal, mask.stock
        self.same_for_heads = mask.same_for_heads

    def at(self, queries: Tensor, slots: Tensor, row: int | Tensor | None = None) -> Tensor:
        """See `Mask.at`; a row is one of the lanes."""
        rows = self._rows if row is None else self._rows[row]
        return self._mask.at(queries, slots, rows if rows.dim() else int(rows))
