"""Writes vectors as codes of few bits; `attention/coded.py` says what they look like."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..attention.coded import bit_masks
from ..attention.constants import constant

HALF = torch.float16
"""The dtype of scales and zero points."""


def bytes_of(size: int, bits: int) -> int:
    """The bytes of the codes of so many numbers."""
    return size * bits // 8


@torch.no_grad()
def encode(vectors: Tensor, most: Tensor | float, group: int) -> tuple[Tensor, Tensor]:
    """The codes of vectors.

    The grid of a group first spans its numbers. It is then fitted to them by least squares, given
    their codes, and each number gets the code of the nearest point of that grid.

    Args:
        vectors: `[..., D]` float.
        most: the largest code, a number or a tensor that broadcasts over `[..., groups, group]`.
        group: numbers that share a grid; it divides D.

    Returns:
        codes `[..., D]` uint8 and grids `[..., 2 * D / group]`; see `Coded`. If a number is not
        finite, or a grid is beyond half precision, the whole vector is read back as not finite.
    """
    groups = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    groups = groups.unflatten(-1, (-1, group))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / most
    codes = _nearest(groups, scale, low, most)
    spread, mean = torch.var_mean(codes, -1, correction=0, keepdim=True)
    together = ((codes - mean) * groups).mean(-1, keepdim=True)
    # Where all codes are the same there is nothing to fit.
    half_scale = torch.where(spread > 0, together / spread, scale).to(HALF)
    scale = half_scale.to(groups.dtype)
    # The zero point goes with the scale as it is rounded.
    half_zero = torch.addcmul(groups.mean(-1, keepdim=True), scale, mean, value=-1).to(HALF)
    codes = _nearest(groups, scale, half_zero.to(groups.dtype), most).to(torch.uint8)
    grid = torch.cat([half_scale, half_zero], -2).flatten(-2)
    # Where a number of it is not finite, all become NaN.
    grid += (grid * 0).sum(-1, keepdim=True)
    return codes.flatten(-2), grid


def _nearest(groups: Tensor, scale: Tensor, zero: Tensor, most: Tensor | float) -> Tensor:
    """The number of the nearest point of each grid, as float."""
    # With a scale of 0 all codes are read back as the zero point, whatever they are.
    codes = ((groups - zero) / scale).nan_to_num_(0).round_().clamp_(min=0)
    return codes.clamp_(max=most)  # type: ignore[call-overload, no-any-return]


@torch.no_grad()
def written_by(
    kernels: ModuleType,
    keys: Tensor,
    values: Tensor,
    bits: tuple[int, int],
    groups: tuple[int, int],
    turn: bool,
) -> tuple[Tensor, Tensor]:
    """The packed codes of keys and then of values, and their grids, by a kernel.

    See `encode` and `packed`.

    Args:
        kernels: `attention.cpu_kernels`.
        keys: `[B, Hkv, Q, D]`.
        values: `[B, Hkv, Q, Dv]`.
        bits: of a code of each.
        groups: how many each has.
        turn: whether vectors are turned first; see `hadamard`.
    """
    wide = torch.promote_types(torch.promote_types(keys.dtype, values.dtype), torch.float32)
    sizes = keys.shape[-1], values.shape[-1]
    length = sum(bytes_of(size, each) for size, each in zip(sizes, bits, strict=True))
    codes = keys.new_empty(*keys.shape[:3], length, dtype=torch.uint8)
    grid = keys.new_empty(*keys.shape[:3], 2 * sum(groups), dtype=wide)
    kernels.write(
        keys.to(wide).reshape(-1, sizes[0]).contiguous().numpy(),
        values.to(wide).reshape(-1, sizes[1]).contiguous().numpy(),
        bits,
        groups,
        turn,
        codes.view(-1, codes.shape[-1]).numpy(),
        grid.view(-1, grid.shape[-1]).numpy(),
    )
    return codes, grid.to(HALF)


def packed(codes: Tensor, bits: int) -> Tensor:
    """`[..., D]` codes, a byte each, in so many bits."""
    if bits == 8:
        return codes
    first, second = (codes if bits == 4 else codes & 15).chunk(2, -1)
    nibbles = first | (second << 4)
    if bits == 4:
        return nibbles
    upper = (codes >> 4).unflatten(-1, (8, -1)) * constant(bit_masks, codes.device)
    return torch.cat([nibbles, upper.sum(-2, dtype=torch.uint8)], -1)
