"""Keys and values of one layer's slots, held as the model made them.

Another way to hold them has the verbs of `Plain`; see `quantized.py`. The layer knows which slots
are in use, which token each holds and which of them go; see `layer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .buffers import extended, gathered, put, roomier, watched


class Plain:
    """Buffers with room for more slots than are in use, of the widest dtype that was stored.

    Args:
        keys: `[B, Hkv, capacity, D]`.
        values: `[B, Hkv, capacity, Dv]`.
    """

    turns = False
    """Whether attention is handed vectors that are turned; see `hadamard`."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values
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
        return self._keys.dtype

    @property
    def heads(self) -> int:
        """Key/value heads, Hkv."""
        return self._keys.shape[1]

    def keys(self, used: int) -> Tensor:
        """`[B, Hkv, used, D]`, a view."""
        return self._keys[:, :, :used]

    def values(self, used: int) -> Tensor:
        """`[B, Hkv, used, Dv]`, a view."""
        return self._values[:, :, :used]

    def append(self, keys: Tensor, values: Tensor, used: int) -> None:
        """Puts new ones `[B, Hkv, Q, D|Dv]` behind the first `used` slots."""
        self._spare_what_was_saved()
        self._keys = extended(self._keys, keys, used)
        self._values = extended(self._values, values, used)

    def put(self, slot: Tensor, keys: Tensor, values: Tensor) -> None:
        """Puts one token `[B, Hkv, 1, D|Dv]` into the slots `[B, 1|Hkv, 1]`."""
        self._spare_what_was_saved()
        self._keys = put(self._keys, slot, keys)
        self._values = put(self._values, slot, values)

    def _spare_what_was_saved(self) -> None:
        """Goes on with copies of buffers that autograd may have saved.

        Only where gradients were on and are off now: while they are on, nothing is written in
        place.
        """
        grad = torch.is_grad_enabled()
        if self._saved and not grad:
            self._keys, self._values = self._keys.clone(), self._values.clone()
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
        if index is None:
            self._keys = torch.cat([keys, self._keys[:, :, used:]], 2)
            return
        if there is not None:
            place = index[..., None].expand_as(keys)
            keys = torch.where(there[..., None], keys, self._keys.gather(2, place))
        self._keys = put(self._keys, index, keys)

    def gather(self, order: Tensor) -> None:
        """Goes on with the slots `order` `[B, 1|Hkv, n]` alone, in that order, and one to spare."""
        spare = 0 if watched(self._keys, self._values) else 1
        self._keys = gathered(self._keys, order, spare)
        self._values = gathered(self._values, order, spare)

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        self._keys = self._keys.index_select(0, rows)
        self._values = self._values.index_select(0, rows)

    def move(self, device: torch.device | str) -> None:
        """Moves everything to a device, without waiting for it."""
        self._keys = self._keys.to(device, non_blocking=True)
        self._values = self._values.to(device, non_blocking=True)

    def tensors(self) -> Iterator[Tensor]:
        """All that is held, for counting bytes."""
        yield from (self._keys, self._values)

    def numbers(self) -> dict[str, Any]:
        """With `named_tensors`, what brings it back; see `restored`."""
        return {}

    def named_tensors(self, used: int) -> dict[str, Tensor]:
        """The slots in use."""
        return {"keys": self.keys(used), "values": self.values(used)}
