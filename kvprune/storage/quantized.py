"""Keys and values of one layer's slots in 8 or 4 bits, with the verbs of `Plain`.

Each token's key and value are quantised by themselves when they are written, so that pieces, beams,
drafts and eviction change nothing; codes are moved, never made anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.hadamard import hadamard
from ..errors import KVPruneError
from .buffers import extended, gathered, put, roomier, watched
from .codes import decode, encode, width

BITS = (4, 8)


@dataclass(frozen=True)
class Quantized:
    """A store that holds keys and values in few bits: `ComposedCache(policies, store=Quantized())`.

    At 4 bits and groups of 32 a slot's key and value take 0.3125 of what they take in bfloat16. The
    model attends to what is read back, also in the forward that writes it.

    Args:
        bits: of each number, 4 or 8.
        group: numbers that share a scale and a zero point, a multiple of 4 that divides the head
            sizes of the model.
        rotate: whether vectors are turned by Hadamard's matrix before, so that no number of a group
            is much larger than the others.

    Raises:
        KVPruneError: other bits, or another group; with a model whose head sizes it does not
            divide, when the cache is first used; where keys or values want a gradient.

    Source: QuaRot (arXiv 2404.00456) for the rotation, KIVI (arXiv 2402.02750) for groups with zero
    points; here keys are in groups along the head, by token, as values.
    """

    bits: int = 4
    group: int = 32
    rotate: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise KVPruneError(f"Quantized: bits={self.bits!r}: expected 4 or 8")
        if type(self.group) is not int or self.group < 4 or self.group % 4:
            raise KVPruneError(
                f"Quantized: group={self.group!r}: expected a number of numbers that share a "
                f"scale, a multiple of 4, as 32"
            )
        if type(self.rotate) is not bool:
            raise KVPruneError(f"Quantized: rotate={self.rotate!r}: expected True or False")

    @property
    def turns(self) -> bool:
        """Whether attention is handed vectors that are turned; see `hadamard`."""
        return self.rotate

    def of(self, keys: Tensor, values: Tensor) -> QuantizedSlots:
        """Holds the first tokens' keys and values.

        Raises:
            KVPruneError: their sizes are no multiples of the group, or they want a gradient.
        """
        sizes = keys.shape[-1], values.shape[-1]
        self.check_sizes(sizes)
        return QuantizedSlots(self, sizes, keys.dtype, self.codes(keys, values))

    def restored(
        self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor], room: int
    ) -> QuantizedSlots:
        """What had these `numbers` and `named_tensors`, with room for more slots."""
        dtype: torch.dtype = getattr(torch, numbers["dtype"])
        codes = roomier(tensors["codes"], room, 0)
        return QuantizedSlots(self, tuple(numbers["sizes"]), dtype, codes)

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Refuses head sizes that the group does not divide.

        Raises:
            KVPruneError: see above.
        """
        if any(size % self.group for size in sizes):
            fit = [n for n in range(4, min(sizes) + 1, 4) if not any(size % n for size in sizes)]
            raise KVPruneError(
                f"{self!r}: this model's keys and values have {' and '.join(map(str, sizes))} "
                f"numbers a head: expected a group that divides these, one of {fit}"
            )

    def codes(self, keys: Tensor, values: Tensor) -> Tensor:
        """What is written of keys `[B, Hkv, Q, D]` and values `[B, Hkv, Q, Dv]`.

        Raises:
            KVPruneError: they want a gradient.
        """
        if keys.requires_grad or values.requires_grad:
            raise KVPruneError(
                f"{self!r}: codes have no gradients: expected a forward within torch.no_grad(), or "
                f"a cache without a store"
            )
        both = (hadamard(keys), hadamard(values)) if self.rotate else (keys, values)
        return torch.cat([encode(each, self.bits, self.group) for each in both], -1)


class QuantizedSlots:
    """Codes with room for more slots than are in use.

    Args:
        store: how numbers are held.
        sizes: D and Dv.
        dtype: of keys and values, the widest that was stored.
        codes: `[B, Hkv, capacity, n]` uint8, those of a slot's key and then those of its value.
    """

    def __init__(
        self, store: Quantized, sizes: Sequence[int], dtype: torch.dtype, codes: Tensor
    ) -> None:
        self._store, self._sizes, self.dtype = store, sizes, dtype
        self._codes = codes

    @property
    def heads(self) -> int:
        """Key/value heads, Hkv."""
        return self._codes.shape[1]

    def keys(self, used: int) -> Tensor:
        """`[B, Hkv, used, D]`, made anew."""
        return self._read(0, used, as_held=False)

    def values(self, used: int) -> Tensor:
        """`[B, Hkv, used, Dv]`, made anew."""
        return self._read(1, used, as_held=False)

    def turned(self, used: int) -> tuple[Tensor, Tensor]:
        """Keys and values without being turned back."""
        return self._read(0, used, as_held=True), self._read(1, used, as_held=True)

    def _read(self, which: int, used: int, as_held: bool) -> Tensor:
        store = self._store
        widths = [width(size, store.bits, store.group) for size in self._sizes]
        codes = self._codes[:, :, :used].split(widths, -1)[which]
        vectors = decode(codes, self._sizes[which], store.bits, store.group, self.dtype)
        return vectors if as_held or not store.rotate else hadamard(vectors)

    def append(self, keys: Tensor, values: Tensor, used: int) -> None:
        """Puts new ones `[B, Hkv, Q, D|Dv]` behind the first `used` slots."""
        self._codes = extended(self._codes, self._written(keys, values), used)

    def put(self, slot: Tensor, keys: Tensor, values: Tensor) -> None:
        """Puts one token `[B, Hkv, 1, D|Dv]` into the slots `[B, 1|Hkv, 1]`."""
        self._codes = put(self._codes, slot, self._written(keys, values))

    def _written(self, keys: Tensor, values: Tensor) -> Tensor:
        self.dtype = torch.promote_types(self.dtype, keys.dtype)
        return self._store.codes(keys, values)

    def gather(self, order: Tensor) -> None:
        """Goes on with the slots `order` `[B, 1|Hkv, n]` alone, in that order, and one to spare."""
        self._codes = gathered(self._codes, order, 0 if watched(self._codes) else 1)

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        self._codes = self._codes.index_select(0, rows)

    def move(self, device: torch.device | str) -> None:
        """Moves everything to a device, without waiting for it."""
        self._codes = self._codes.to(device, non_blocking=True)

    def tensors(self) -> Iterator[Tensor]:
        """All that is held, for counting bytes."""
        yield self._codes

    def numbers(self) -> dict[str, Any]:
        """With `named_tensors`, what brings it back; see `Quantized.restored`."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "sizes": list(self._sizes)}

    def named_tensors(self, used: int) -> dict[str, Tensor]:
        """The slots in use."""
        return {"codes": self._codes[:, :, :used]}
