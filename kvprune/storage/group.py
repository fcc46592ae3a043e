"""Layers that decode together: each loses one slot in every row and head, and takes one token.

That is a dozen small operations, which cost more by their number than by their work. So the columns
and statistics of such layers stand below each other, as more rows of one tensor of which each layer
holds a view, and a policy that promises `layers_alike` ranks them all at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .buffers import put
from .rectangle import Rectangle


class LayerGroup:
    """Layers that are alike: of the same shapes, full for the same policy, without a free slot.

    columns: `[n * B, 1|Hkv, S]` int64.
    statistics: each `[n * B, Hkv, S]`.
    """

    def __init__(self, layers: Sequence[Rectangle]) -> None:
        self._layers = tuple(layers)
        each = [layer.statistics for layer in layers]
        self.columns = torch.cat([layer.columns for layer in layers])
        self.statistics = {part: torch.cat([one[part] for one in each]) for part in layers[0].parts}
        # The slots that went last `[n * B, 1|Hkv, 1]`, until a token takes them.
        self._free_slots: Tensor | None = None
        self._lend()

    def lent_to(self, layers: Sequence[Rectangle]) -> bool:
        """Whether what these layers hold is what they were lent.

        Whatever else changes a layer's slots puts other tensors in the place of these.
        """
        if len(layers) != len(self._layers):
            return False
        each = zip(layers, self._layers, self._lent, strict=True)
        return all(layer is known and layer.borrows(*lent) for layer, known, lent in each)

    def free(self, gone: Tensor, policy: int) -> None:
        """Drops one slot in every row and head; see `SlotLayer.free`.

        Args:
            gone: `[n * B, 1|Hkv, 1]` int64.
            policy: what the layers are full for; see `Turnover`.
        """
        each = gone.chunk(len(self._layers))
        if gone.shape[1] != self.columns.shape[1]:
            for layer, one in zip(self._layers, each, strict=True):
                layer.free(one, policy)
            return
        self._put(gone, -1)
        self._free_slots = gone
        for layer, slot in zip(self._layers, each, strict=True):
            layer.turnover = layer.turnover.freed(slot, policy)

    def write_column(self, columns: Tensor) -> None:
        """The next token takes the slots that are free: all of it but its keys and values.

        Args:
            columns: `[B, 1, 1]` int64.
        """
        if self._free_slots is None or not self.lent_to(self._layers):
            return
        new = columns.repeat(len(self._layers), 1, 1).expand_as(self._free_slots)
        self._put(self._free_slots, new, begins=True)
        self._free_slots = None
        for layer in self._layers:
            layer.turnover = layer.turnover.taken()

    def _put(self, slots: Tensor, column: Tensor | int, begins: bool = False) -> None:
        """Writes to one slot in every row and head; where a token begins, its statistics too."""
        before = [self.columns, *self.statistics.values()]
        self.columns = put(self.columns, slots, column)
        if begins:
            self.statistics = {
                part: put(value, slots.expand(-1, value.shape[1], -1), part.start)
                for part, value in self.statistics.items()
            }
        now = (self.columns, *self.statistics.values())
        if any(one is not other for one, other in zip(before, now, strict=True)):
            # Not in place, as somebody watches.
            self._lend()

    def _lend(self) -> None:
        """Hands each layer its part."""
        count = len(self._layers)
        columns = self.columns.chunk(count)
        parts = {name: value.chunk(count) for name, value in self.statistics.items()}
        self._lent = [
            (part, {name: each[i] for name, each in parts.items()})
            for i, part in enumerate(columns)
        ]
        for layer, lent in zip(self._layers, self._lent, strict=True):
            layer.borrow(*lent)
