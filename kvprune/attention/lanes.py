"""Lanes: the rows of a layer, or the heads of its rows, that keep different numbers of slots.

A layer whose lanes keep about as many slots is one rectangle `[B, Hkv, S]`. Where they part ways,
it is several, each of the lanes that keep about as many. Here is how tensors of a whole layer are
cut for its rectangles, and put together again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..models.devices import without_autocast
from .masks import Mask


class Lanes:
    """Which lanes of a layer stand in which of its rectangles.

    Args:
        rows: B, of the layer.
        heads: the key/value heads that are stored, Hkv.
        by_head: a lane is one head of a row; else it is a row, with all its heads.
        numbers: by rectangle, its lanes, ascending: rows, or `row * heads + head`.
        device: where the layer is.
    """

    def __init__(
        self,
        rows: int,
        heads: int,
        by_head: bool,
        numbers: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        self.rows, self.heads, self.by_head = rows, heads, by_head
        self.numbers, self.device = tuple(map(tuple, numbers)), device
        order = [lane for lanes in self.numbers for lane in lanes]
        self._sizes = [len(lanes) for lanes in self.numbers]
        width = heads if by_head else 1
        self._rows_by_number = [[n // width for n in lanes] for lanes in self.numbers]
        # Autograd may save these, which it does not with tensors of inference mode.
        with torch.inference_mode(False):
            # None where the lanes, rectangle after rectangle, are in the order of the layer.
            in_order = order == sorted(order)
            self._order = None if in_order else torch.tensor(order, device=device)
            self._places = None if self._order is None else self._order.argsort()
            each = torch.tensor([n // width for n in order], device=device)
            self._rows = each.split(self._sizes)

    def tensors(self) -> Iterator[Tensor]:
        """All that is held, for counting bytes."""
        yield from (t for t in (self._order, self._places, *self._rows) if t is not None)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """`[B, 1|Hkv, ...]` for each rectangle: `[N, 1|Hkv, ...]`, by head `[N, 1, ...]`; views."""
        if self.by_head:
            if tensor.shape[1] < self.heads:
                tensor = tensor.expand(-1, self.heads, *tensor.shape[2:])
            tensor = tensor.reshape(-1, 1, *tensor.shape[2:])
        return self._dealt_out(tensor)

    def split_queries(self, query: Tensor) -> tuple[Tensor, ...]:
        """`[B, Hq, Q, D]` for each rectangle: the query heads that read its lanes."""
        if self.by_head:
            query = query.reshape(-1, query.shape[1] // self.heads, *query.shape[2:])
        return self._dealt_out(query)

    def split_columns(self, columns: Tensor, same: bool) -> tuple[Tensor, ...]:
        """Columns of tokens `[B, Q]` or `[B, 1, Q]` for each rectangle, `[N, Q]` or `[N, 1, Q]`.

        Args:
            columns: int64.
            same: it is known that all rows have the same.
        """
        if same:
            one, rest = columns[:1], columns.shape[1:]
            return tuple(one if size == 1 else one.expand(size, *rest) for size in self._sizes)
        return tuple(columns.index_select(0, rows) for rows in self._rows)

    def masks(self, mask: Mask) -> list[LaneMask]:
        """A rule of the layer, for each rectangle."""
        each = zip(self._rows, self._rows_by_number, strict=True)
        return [LaneMask(mask, rows, numbers) for rows, numbers in each]

    def _dealt_out(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if self._order is not None:
            tensor = tensor.index_select(0, self._order)
        return tensor.split_with_sizes(self._sizes)

    def _in_layers_order(self, tensors: Sequence[Tensor]) -> Tensor:
        # Autocast on a CPU does not put tensors in half precision together, as scales of a store.
        with without_autocast(tensors[0].device):
            whole = torch.cat(list(tensors))
        return whole if self._places is None else whole.index_select(0, self._places)

    def selected(self, rows: Sequence[int]) -> tuple[Lanes, list[list[int]]]:
        """The lanes once row i is what row `rows[i]` was.

        Returns:
            the lanes, without rectangles that nothing is left of; and by rectangle of today, the
            places of the lanes that it then has, among those of today.
        """
        width = self.heads if self.by_head else 1
        wanted = [
            (i * width + head, row * width + head)
            for i, row in enumerate(rows)
            for head in range(width)
        ]
        numbers, places = [], []
        for lanes in self.numbers:
            place = {lane: i for i, lane in enumerate(lanes)}
            here = [(new, place[old]) for new, old in wanted if old in place]
            numbers.append([new for new, _ in here])
            places.append([at for _, at in here])
        left = [lanes for lanes in numbers if lanes]
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
        whole = self._in_layers_order([_right_aligned(t, size, fill, axis) for t in tensors])
        return whole.view(self.rows, self.heads, *whole.shape[2:]) if self.by_head else whole

    def join_outputs(self, outputs: Sequence[Tensor]) -> Tensor:
        """Outputs `[N, Q, heads, Dv]` of each rectangle's query heads: `[B, Q, Hq, Dv]`."""
        whole = self._in_layers_order(outputs)
        if not self.by_head:
            return whole
        if whole.shape[1] == 1:
            return whole.view(self.rows, 1, -1, whole.shape[-1])
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
        numbers: the same as plain numbers.
    """

    def __init__(self, mask: Mask, rows: Tensor, numbers: Sequence[int]) -> None:
        self._mask, self._rows, self._numbers = mask, rows, numbers
        self.plainly_causal, self.stock = mask.plainly_causal, mask.stock
        self.same_for_heads = mask.same_for_heads

    def at(self, queries: Tensor, slots: Tensor, row: int | Tensor | None = None) -> Tensor:
        """See `Mask.at`; a row is one of the lanes."""
        if isinstance(row, int):
            return self._mask.at(queries, slots, self._numbers[row])
        return self._mask.at(queries, slots, self._rows if row is None else self._rows[row])
