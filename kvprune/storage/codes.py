"""Vectors as codes of few bits: what is written, and what is read back.

A vector `[D]` is cut into groups. Each group has a grid of `2**bits` evenly spaced numbers, from a
zero point on; a number becomes the code of the nearest of them. A vector's bytes are its codes, in
4 bits two to a byte, then the groups' scales, then their zero points, both in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = torch.float16
"""The dtype of scales and zero points."""


def width(size: int, bits: int, group: int) -> int:
    """The bytes of a vector of so many numbers."""
    return size * bits // 8 + size // group * 2 * HALF.itemsize


def encode(vectors: Tensor, bits: int, group: int) -> Tensor:
    """The codes of vectors.

    Args:
        vectors: `[..., D]` float.
        bits: 8 or 4.
        group: numbers that share a grid; it divides D, and is even.

    Returns:
        `[..., width]` uint8. What is not finite, or beyond half precision, is read back as not
        finite.
    """
    groups = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    groups = groups.unflatten(-1, (-1, group))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    most = 2**bits - 1
    scale, zero = ((high - low) / most).to(HALF), low.to(HALF)
    steps = (groups - zero) / scale
    # A group of equal numbers has a scale of 0: all of them are its zero point.
    codes = steps.nan_to_num_(0).round_().clamp_(0, most).to(torch.uint8)
    if bits == 4:
        first, second = codes.chunk(2, -1)
        codes = first | (second << 4)
    grid = torch.cat([scale.flatten(-2), zero.flatten(-2)], -1)
    return torch.cat([codes.flatten(-2), grid.view(torch.uint8)], -1)


def decode(written: Tensor, size: int, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """The vectors `[..., size]` of a dtype that codes `[..., width]` stand for."""
    groups, wide = size // group, torch.promote_types(dtype, torch.float32)
    codes, grid = written.split([size * bits // 8, groups * 2 * HALF.itemsize], -1)
    scale, zero = grid.view(HALF)[..., None].chunk(2, -2)
    codes = codes.unflatten(-1, (groups, -1))
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    numbers = torch.addcmul(zero.to(wide), codes.to(wide), scale.to(wide))
    return numbers.flatten(-2).to(dtype)
