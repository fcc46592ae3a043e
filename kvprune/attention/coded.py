"""Vectors that are held as codes of few bits: read back, and attended to without reading back.

A vector `[D]` is cut into groups. Each group has a scale and a zero point, and a code c stands for
`scale * c + zero`. For a query q a group adds `scale * (q . c) + zero * sum(q)` to the product, so
keys need not be read back; likewise values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import nan
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..models.devices import without_autocast
from .constants import constant
from .hadamard import hadamard
from .native import cpu_kernels_for

BLOCK = 1 << 12
"""Slots that are read at once: what is made on the way is wider than what is wanted."""


LARGE = 64
"""The size from which on vectors get kernels of their own, which take seconds to compile."""


@dataclass(frozen=True, eq=False)
class Coded:
    """Vectors of so many slots, `[B, H, S, D]`, as codes.

    codes: `[B, H, S, n]` uint8. In 8 bits a byte is a code. In 4 bits the lower half of byte i is
        number i, its upper half number i + D / 2. In 5 bits the fifth bits are D / 8 bytes more:
        bit b of byte j is that of number b * D / 8 + j.
    grid: `[B, H, S, 2 * D / group]` in half precision, scales and then zero points.
    bits: 8, 5 or 4.
    group: numbers that share a scale.
    size: D.
    """

    codes: Tensor
    grid: Tensor
    bits: int
    group: int
    size: int

    def shape_alone(self, dtype: torch.dtype) -> Tensor:
        """`[B, H, S, D]` without numbers: NaN, so that whoever reads it is found out."""
        nothing = torch.full((), nan, dtype=dtype, device=self.codes.device)
        return nothing.expand(*self.codes.shape[:3], self.size)

    def blocks(self) -> list[Coded]:
        """The same in pieces of so many slots; itself, where it is short."""
        if self.codes.shape[2] <= BLOCK:
            return [self]
        pieces = zip(self.codes.split(BLOCK, 2), self.grid.split(BLOCK, 2), strict=True)
        return [replace(self, codes=codes, grid=grid) for codes, grid in pieces]

    def vectors(self, dtype: torch.dtype) -> Tensor:
        """The vectors themselves, of a dtype."""
        blocks = self.blocks()
        if len(blocks) == 1:
            return self._vectors(dtype)
        found = self.codes.new_empty((*self.codes.shape[:3], self.size), dtype=dtype)
        for place, block in zip(found.split(BLOCK, 2), blocks, strict=True):
            place.copy_(block._vectors(dtype))
        return found

    def products(self, queries: Tensor, turn: bool = False) -> Tensor:
        """`[B, H, G, D]` times every vector: `[B, H, G, S]`.

        Args:
            queries: see above.
            turn: whether to turn them first; see `hadamard`.
        """
        blocks = self.blocks()
        if len(blocks) == 1:
            return self._products(queries, turn)
        queries = hadamard(queries) if turn else queries
        return torch.cat([block._products(queries, turn=False) for block in blocks], -1)

    def weighted(self, weights: Tensor, turn: bool = False) -> Tensor:
        """The sums of all vectors by weights `[B, H, G, S]`: `[B, H, G, D]`.

        Args:
            weights: see above.
            turn: whether to turn the sums; see `hadamard`.
        """
        blocks = self.blocks()
        if len(blocks) == 1:
            return self._weighted(weights, turn)
        each = zip(blocks, weights.split(BLOCK, -1), strict=True)
        found = torch.stack([block._weighted(mine, turn=False) for block, mine in each]).sum(0)
        return hadamard(found) if turn else found

    def _vectors(self, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        kernels = self._kernels
        if kernels is not None:
            found = self.codes.new_empty(*self.codes.shape[:3], self.size, dtype=wide)
            kernels.read(*self._held(), found.numpy())
            return found.to(dtype)
        with without_autocast(self.codes.device):
            scale, zero = self._grid(wide)
            # Each number's own by a product: broadcasting over short groups is slow.
            groups = constant(_groups, self.size, self.group, wide, scale.device)
            return self._numbers(wide).mul_(scale @ groups).add_(zero @ groups).to(dtype)

    @property
    def _kernels(self) -> ModuleType | None:
        """The kernels that can read these codes, eight bytes at once; None where none can."""
        codes, kernels = self.codes, cpu_kernels_for(self.codes)
        if kernels is None or not codes.numel() or codes.stride(3) != 1:
            return None
        whole = (codes.shape[3], codes.storage_offset(), *codes.stride()[:3])
        return None if any(n % 8 for n in whole) else kernels

    def _kind(self, dtype: torch.dtype) -> tuple[int | None, int | None]:
        """What kernels are compiled for; None for all, where it would not pay."""
        pays = self.size >= LARGE and dtype == torch.float32
        return (self.size, self.size // self.group) if pays else (None, None)

    def _held(self) -> tuple[Any, ...]:
        """What a kernel is told about codes; see `cpu_kernels`."""
        words = self.codes.numpy().view("uint64")
        grid = self.grid.view(torch.int16).numpy().view("uint16")
        return words, grid, self.bits, self.size // self.group

    def _products(self, queries: Tensor, turn: bool) -> Tensor:
        kernels = self._kernels
        if kernels is not None and not queries.requires_grad:
            found = queries.new_empty(*queries.shape[:3], self.codes.shape[2])
            products, _ = kernels.over_vectors(*self._kind(queries.dtype))
            products(*self._held(), turn, queries.contiguous().numpy(), found.numpy())
            return found
        queries = hadamard(queries) if turn else queries
        groups = constant(_groups, self.size, self.group, queries.dtype, queries.device)
        with without_autocast(queries.device):
            scale, zero = self._grid(queries.dtype)
            # `[B, H, G, groups, D]`: each group of a query by itself.
            apart = queries[..., None, :] * groups
            products = apart.flatten(2, 3) @ self._numbers(queries.dtype).mT
            scaled = products.unflatten(2, apart.shape[2:4]) * scale.mT[:, :, None]
            return scaled.sum(3) + apart.sum(-1) @ zero.mT

    def _weighted(self, weights: Tensor, turn: bool) -> Tensor:
        kernels = self._kernels
        if kernels is not None and not weights.requires_grad:
            found = weights.new_empty(*weights.shape[:3], self.size)
            _, weighted = kernels.over_vectors(*self._kind(weights.dtype))
            weighted(*self._held(), turn, weights.contiguous().numpy(), found.numpy())
            return found
        groups = constant(_groups, self.size, self.group, weights.dtype, weights.device)
        with without_autocast(weights.device):
            scale, zero = self._grid(weights.dtype)
            # `[B, H, G, groups, S]`: by each group's scales.
            scaled = weights[:, :, :, None] * scale.mT[:, :, None]
            sums = scaled.flatten(2, 3) @ self._numbers(weights.dtype)
            own = (sums.unflatten(2, scaled.shape[2:4]) * groups).sum(3)
            found = own + (weights @ zero) @ groups
            return hadamard(found) if turn else found

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        """Codes as numbers, `[B, H, S, D]`."""
        if self.bits == 8:
            return self.codes.to(dtype)
        half, device = self.size // 2, self.codes.device
        nibbles = self.codes if self.bits == 4 else self.codes[..., :half]
        # One half after the other: broadcasting over short rows is slow.
        numbers = torch.cat([nibbles & 15, nibbles >> 4], -1)
        if self.bits == 5:
            fifth = self.codes[..., None, half:] & constant(bit_masks, device)
            numbers.add_(fifth.ne(0).flatten(-2), alpha=16)
        return numbers.to(dtype)

    def _grid(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales and zero points, each `[B, H, S, groups]`."""
        scale, zero = self.grid.to(dtype).chunk(2, -1)
        return scale, zero


def _groups(size: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which numbers are of which group, `[groups, D]`: 1 or 0."""
    own = torch.eye(size // group, dtype=dtype, device=device)
    return own.repeat_interleave(group, 1)


def bit_masks(device: torch.device) -> Tensor:
    """Each bit of a byte, `[8, 1]`."""
    return torch.tensor([[1 << bit] for bit in range(8)], dtype=torch.uint8, device=device)
