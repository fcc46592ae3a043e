"""Keys and values of one layer's slots in few bits, with the verbs of `Plain`.

Each token's key and value are quantised by themselves when they are written, so that pieces, beams,
drafts and eviction change nothing; codes are moved, never made anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.coded import Coded
from ..attention.constants import constant
from ..attention.hadamard import hadamard
from ..attention.native import cpu_kernels_for
from ..errors import KVPruneError
from ..models.devices import without_autocast
from .buffers import extended, put, roomier
from .codes import bytes_of, encode, packed, written_by
from .held import Held

BITS = (4, 5, 8)

MOST = 64
"""The largest group that is chosen by default."""


@dataclass(frozen=True)
class Quantized:
    """A store that holds keys and values in few bits: `ComposedCache(policies, store=Quantized())`.

    By default a slot's key and value take 0.3125 of what they take in bfloat16, where 64 divides
    the head size; so they do with `bits=4, group=32`. The model attends to what is read back, also
    in the forward that writes it.

    Args:
        bits: of each number, 4, 5 or 8; a pair for keys and values, as (5, 4).
        group: numbers that share a scale and a zero point, which take 32 bits together; it divides
            the head sizes of the model. None for the largest even number up to 64 that does. 5 bits
            need head sizes that 8 divides.
        rotate: whether vectors are turned by Hadamard's matrix before, so that no number of a group
            is much larger than the others.

    Raises:
        KVPruneError: other bits, or another group; with a model whose head sizes it does not
            divide, when the cache is first used; where keys or values want a gradient.

    Source: QuaRot (arXiv 2404.00456) for the rotation, KIVI (arXiv 2402.02750) for groups with zero
    points; here both keys and values are grouped within a token, and keys have the more bits, since
    an error in a key costs more.
    """

    bits: int | tuple[int, int] = (5, 4)
    group: int | None = None
    rotate: bool = True

    def __post_init__(self) -> None:
        pair = self.bits if isinstance(self.bits, tuple) else (self.bits, self.bits)
        if len(pair) != 2 or any(type(bits) is not int or bits not in BITS for bits in pair):
            raise KVPruneError(
                f"Quantized: bits={self.bits!r}: expected 4, 5 or 8, or two of these, for keys and "
                f"values"
            )
        group = self.group
        if group is not None and (type(group) is not int or group < 2 or group % 2):
            raise KVPruneError(
                f"Quantized: group={self.group!r}: expected how many numbers share a scale, an "
                f"even number, as 32"
            )
        if pair[0] == pair[1]:
            object.__setattr__(self, "bits", pair[0])
        if type(self.rotate) is not bool:
            raise KVPruneError(f"Quantized: rotate={self.rotate!r}: expected True or False")

    @property
    def each(self) -> tuple[int, int]:
        """The bits of keys and of values."""
        return self.bits if isinstance(self.bits, tuple) else (self.bits, self.bits)

    def group_of(self, size: int) -> int:
        """The group of vectors of a size."""
        if self.group is not None:
            return self.group
        return max(n for n in range(2, min(size, MOST) + 1, 2) if size % n == 0)

    @property
    def turns(self) -> bool:
        """Whether attention is handed vectors that are turned; see `hadamard`."""
        return self.rotate

    def of(self, keys: Tensor, values: Tensor) -> QuantizedSlots:
        """Holds the first tokens' keys and values.

        Raises:
            KVPruneError: the group does not divide their sizes, or they want a gradient.
        """
        sizes = keys.shape[-1], values.shape[-1]
        self.check_sizes(sizes)
        return QuantizedSlots(self, sizes, keys.dtype, *self.written(keys, values))

    def restored(
        self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor], room: int
    ) -> QuantizedSlots:
        """What had these `numbers` and `named_tensors`, with room for more slots."""
        dtype: torch.dtype = getattr(torch, numbers["dtype"])
        buffers = (roomier(tensors[name], room, 0) for name in ("codes", "grids"))
        return QuantizedSlots(self, tuple(numbers["sizes"]), dtype, *buffers)

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Refuses head sizes of a model that the group does not divide.

        Raises:
            KVPruneError: see above.
        """
        said = f"this model's keys and values have {' and '.join(map(str, sizes))} numbers a head"
        if any(size % (self.group or 2) for size in sizes):
            fit = [n for n in range(2, min(sizes) + 1, 2) if not any(size % n for size in sizes)]
            expected = f"a group that divides these, one of {fit}" if fit else "even numbers"
            raise KVPruneError(f"{self!r}: {said}: expected {expected}")
        if 5 in self.each and any(size % 8 for size in sizes):
            raise KVPruneError(f"{self!r}: {said}, which 8 does not divide: expected 4 or 8 bits")

    def written(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and grids of keys `[B, Hkv, Q, D]`, and behind them those of values.

        Raises:
            KVPruneError: they want a gradient.
        """
        if keys.requires_grad or values.requires_grad:
            raise KVPruneError(
                f"{self!r}: codes have no gradients: expected a forward within torch.no_grad(), or "
                f"a cache without a store"
            )
        with without_autocast(keys.device):
            return self._written(keys, values)

    def _written(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        kernels = cpu_kernels_for(keys)
        if kernels is not None:
            sizes = keys.shape[-1], values.shape[-1]
            groups = sizes[0] // self.group_of(sizes[0]), sizes[1] // self.group_of(sizes[1])
            return written_by(kernels, keys, values, self.each, groups, self.rotate)
        if keys.shape == values.shape and keys.dtype == values.dtype:
            # Both at once: in decoding, operators cost more by their number than by their work.
            both = torch.stack([keys, values])
            codes, grids = map(
                tuple, self._encoded(both, constant(_largest_codes, self.each, keys.device))
            )
        else:
            each = zip((keys, values), self.each, strict=True)
            found = [self._encoded(vectors, 2**bits - 1) for vectors, bits in each]
            codes, grids = tuple(c for c, _ in found), tuple(g for _, g in found)
        written = [packed(each, bits) for each, bits in zip(codes, self.each, strict=True)]
        return torch.cat(written, -1), torch.cat(grids, -1)

    def _encoded(self, vectors: Tensor, most: Tensor | float) -> tuple[Tensor, Tensor]:
        # Wide before it is turned: lengths add up, beyond what half precision holds.
        wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        return encode(
            hadamard(wide) if self.rotate else wide, most, self.group_of(vectors.shape[-1])
        )


def _largest_codes(each: tuple[int, int], device: torch.device) -> Tensor:
    """The largest codes of keys and of values, `[2, 1, 1, 1, 1, 1]`."""
    return torch.tensor([2.0**bits - 1 for bits in each], device=device).view(2, *(1,) * 5)


class QuantizedSlots(Held):
    """Codes with room for more slots than are in use.

    Args:
        store: how numbers are held.
        sizes: D and Dv.
        dtype: of keys and values, the widest that was stored.
        codes, grids: `[B, Hkv, capacity, n]`, those of a slot's key and then those of its value;
            see `Coded`.
    """

    def __init__(
        self,
        store: Quantized,
        sizes: Sequence[int],
        dtype: torch.dtype,
        codes: Tensor,
        grids: Tensor,
    ) -> None:
        super().__init__(codes, grids)
        self._store, self._sizes, self.dtype = store, sizes, dtype

    def keys(self, used: int) -> Tensor:
        """`[B, Hkv, used, D]`, made anew."""
        return self._turned_back(self.coded(used)[0])

    def values(self, used: int) -> Tensor:
        """`[B, Hkv, used, Dv]`, made anew."""
        return self._turned_back(self.coded(used)[1])

    def _turned_back(self, coded: Coded) -> Tensor:
        if not self._store.rotate:
            return coded.vectors(self.dtype)
        # Rounded to the dtype once.
        wide = torch.promote_types(self.dtype, torch.float32)
        return hadamard(coded.vectors(wide)).to(self.dtype)

    def turned(self, used: int) -> tuple[Tensor, Tensor]:
        """Keys and values without being turned back."""
        keys, values = self.coded(used)
        return keys.vectors(self.dtype), values.vectors(self.dtype)

    def coded(self, used: int) -> tuple[Coded, Coded]:
        """Keys and values as they are held."""
        bits, sizes = self._store.each, self._sizes
        groups = [self._store.group_of(size) for size in sizes]
        codes, grids = (buffer[:, :, :used] for buffer in self.buffers)
        first, begin = bytes_of(sizes[0], bits[0]), 2 * (sizes[0] // groups[0])
        return (
            Coded(codes[..., :first], grids[..., :begin], bits[0], groups[0], sizes[0]),
            Coded(codes[..., first:], grids[..., begin:], bits[1], groups[1], sizes[1]),
        )

    def append(self, keys: Tensor, values: Tensor, used: int) -> None:
        """Puts new ones `[B, Hkv, Q, D|Dv]` behind the first `used` slots."""
        new = self._written(keys, values)
        self._write(lambda buffer, mine: extended(buffer, mine, used), *new)

    def put(self, slot: Tensor, keys: Tensor, values: Tensor) -> None:
        """Puts one token `[B, Hkv, 1, D|Dv]` into the slots `[B, 1|Hkv, 1]`."""
        self._write(lambda buffer, mine: put(buffer, slot, mine), *self._written(keys, values))

    def _written(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for vectors in (keys, values):
            self.dtype = torch.promote_types(self.dtype, vectors.dtype)
        return self._store.written(keys, values)

    def numbers(self) -> dict[str, Any]:
        """With `named_tensors`, what brings it back; see `Quantized.restored`."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "sizes": list(self._sizes)}

    def named_tensors(self, used: int) -> dict[str, Tensor]:
        """The slots in use."""
        codes, grids = (buffer[:, :, :used] for buffer in self.buffers)
        return {"codes": codes, "grids": grids}
