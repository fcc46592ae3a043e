"""Keys and values of one layer's slots, held as the model made them.

Another way to hold them has the verbs of `Plain`; see `quantized.py`. The layer knows which slots
are in use, which token each holds and which of them go; see `layer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .buffers import extended, first_slots, index_of, put, roomier
from .held import Held


class Plain(Held):
    """Buffers with room for more slots than are in use, of the widest dtype that was stored.

    Args:
        keys: `[B, Hkv, capacity, D]`.
        values: `[B, Hkv, capacity, Dv]`.
    """

    turns = False
    """Whether attention is handed vectors that are turned; see `hadamard`."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__(keys, values)
        # Whether a forward with gradients attended to the buffers as they are now.
        self._saved = False

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Plain:
        """Holds copies of the first tokens' keys and values."""
        held = cls(extended(None, keys, 0), extended(None, values, 0))
        held._saved = torch.is_grad_enabled()
        return held

    @classmethod
    def restored(
        cls, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor], room: int
    ) -> Plain:
        """What had these `numbers` and `named_tensors`, with room for more slots."""
        return cls(roomier(tensors["keys"], room, 0), roomier(tensors["values"], room, 0))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self.buffers[0].dtype

    def keys(self, used: int) -> Tensor:
        """`[B, Hkv, used, D]`, not copied."""
        return first_slots(self.buffers[0], used)

    def values(self, used: int) -> Tensor:
        """`[B, Hkv, used, Dv]`, not copied."""
        return first_slots(self.buffers[1], used)

    def append(self, keys: Tensor, values: Tensor, used: int) -> None:
        """Puts new ones `[B, Hkv, Q, D|Dv]` behind the first `used` slots."""
        self._spare_what_was_saved()
        self._write(lambda buffer, new: extended(buffer, new, used), keys, values)

    def put(self, slot: Tensor, keys: Tensor, values: Tensor) -> None:
        """Puts one token `[B, Hkv, 1, D|Dv]` into the slots `[B, 1|Hkv, 1]`."""
        self._spare_what_was_saved()
        # Made once for both, where they have as many numbers.
        index = index_of(slot, keys) if keys.shape == values.shape else slot
        held_keys, held_values = self.buffers
        self.buffers = put(held_keys, index, keys), put(held_values, index, values)

    def _spare_what_was_saved(self) -> None:
        """Goes on with copies of buffers that autograd may have saved.

        Only where gradients were on and are off now: while they are on, nothing is written in
        place.
        """
        grad = torch.is_grad_enabled()
        if self._saved and not grad:
            self.buffers = tuple(buffer.clone() for buffer in self.buffers)
        self._saved = grad

    def rewrite_keys(
        self, keys: Tensor, used: int, index: Tensor | None = None, there: Tensor | None = None
    ) -> None:
        """Puts other keys in the place of those that are held.

        Args:
            keys: `[B, Hkv, S, D]`; of the slots `index` alone if that is given.
            used: how many slots are in use.
            index: `[B, 1, n]` int64, each slot of a row once.
            there: `[B, 1, n]` bool, which of these are meant; None for all.
        """
        held, values = self.buffers
        if index is None:
            self.buffers = torch.cat([keys, held[:, :, used:]], 2), values
            return
        if there is not None:
            place = index[..., None].expand_as(keys)
            keys = torch.where(there[..., None], keys, held.gather(2, place))
        self.buffers = put(held, index, keys), values

    def numbers(self) -> dict[str, Any]:
        """With `named_tensors`, what brings it back; see `restored`."""
        return {}

    def named_tensors(self, used: int) -> dict[str, Tensor]:
        """The slots in use."""
        return {"keys": self.keys(used), "values": self.values(used)}
