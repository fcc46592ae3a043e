"""Vectors that are held as codes of few bits: read back, and attended to without reading back.

A vector `[D]` is cut into groups. Each group has a grid of evenly spaced numbers, from a zero point
on; a code says which of them. So a product with a vector is a product with its codes, times the
scale, plus the zero point times the sum of what it is multiplied with: codes become floats, and
nothing else of the length of the vectors is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Coded:
    """Vectors of so many slots, `[B, H, S, D]`, as codes.

    codes: `[B, H, S, n]` uint8. In 8 bits a byte is a code. In 4, byte i has number i, and above it
        number i + D / 2. In 5 the upper bits are D / 8 bytes more, of which byte j has, in bit b,
        that of number b * D / 8 + j.
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

    def vectors(self, dtype: torch.dtype) -> Tensor:
        """The vectors themselves, of a dtype."""
        wide = torch.promote_types(dtype, torch.float32)
        numbers = torch.cat([part.to(wide) for part in self._parts()], -1)
        if self.bits == 5:
            lower, upper = numbers.chunk(2, -1)
            numbers = lower.addcmul(upper, self._upper(wide))
        # To every number its own, as a product: broadcasting over short groups is slow.
        scale, zero = self._grid(wide)
        groups = _groups(self.size, self.group, wide, scale.device)
        return torch.addcmul(zero @ groups, numbers, scale @ groups).to(dtype)

    def products(self, queries: Tensor) -> Tensor:
        """`[B, H, G, D]` times every vector: `[B, H, G, S]`."""
        scale, zero = self._grid(queries.dtype)
        groups = _groups(self.size, self.group, queries.dtype, queries.device)
        count = groups.shape[0]
        # `[B, H, G, groups, D]`: each group of a query by itself.
        apart = queries[..., None, :] * groups
        sums = apart.sum(-1).mT
        apart = apart.flatten(2, 3).mT
        if self.bits == 5:
            apart = torch.cat([apart, apart * self._upper(queries.dtype)[:, None]], 2)
        found, start = None, 0
        for part in self._parts():
            here = part.to(queries.dtype) @ apart[:, :, start : start + part.shape[-1]]
            found, start = here if found is None else found.add_(here), start + part.shape[-1]
        assert found is not None
        found = found.unflatten(-1, (-1, count)) * scale[..., None, :]
        return (found.sum(-1) + zero @ sums).mT

    def weighted(self, weights: Tensor) -> Tensor:
        """The sums of all vectors by weights `[B, H, G, S]`: `[B, H, G, D]`."""
        scale, zero = self._grid(weights.dtype)
        groups = _groups(self.size, self.group, weights.dtype, weights.device)
        # `[B, H, G, groups, S]`.
        scaled = weights[:, :, :, None] * scale.mT[:, :, None]
        rows = scaled.flatten(2, 3)
        found = torch.cat([rows @ part.to(weights.dtype) for part in self._parts()], -1)
        if self.bits == 5:
            lower, upper = found.chunk(2, -1)
            found = lower.addcmul(upper, self._upper(weights.dtype))
        found = (found.unflatten(2, scaled.shape[2:4]) * groups).sum(-2)
        return found + (weights @ zero) @ groups

    def _parts(self) -> list[Tensor]:
        """Codes, each `[B, H, S, m]` uint8: of all numbers in order, and then their upper bits."""
        if self.bits == 8:
            return [self.codes]
        half = self.size // 2
        nibbles = self.codes if self.bits == 4 else self.codes[..., :half]
        parts = [nibbles & 15, nibbles >> 4]
        if self.bits == 5:
            upper = self.codes[..., half:]
            masks = _masks(upper.device)
            parts.append((upper[..., None, :] & masks[:, None]).flatten(-2))
        return parts

    def _upper(self, dtype: torch.dtype) -> Tensor:
        """What an upper bit is worth, `[D]`: bit b of a byte stands for 16 by 2**b."""
        worth = 16.0 / _masks(self.codes.device).to(dtype)
        return worth.repeat_interleave(self.size // 8)

    def _grid(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales and zero points, each `[B, H, S, groups]`."""
        scale, zero = self.grid.to(dtype).chunk(2, -1)
        return scale, zero


@lru_cache(maxsize=32)
def _groups(size: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which numbers are of which group, `[groups, D]`: 1 or 0."""
    with torch.inference_mode(False):
        own = torch.eye(size // group, dtype=dtype, device=device)
        return own.repeat_interleave(group, 1)


@lru_cache(maxsize=8)
def _masks(device: torch.device) -> Tensor:
    """The bits of a byte, `[8]` uint8."""
    with torch.inference_mode(False):
        return torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)
