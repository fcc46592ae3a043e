"""Writes vectors as codes of few bits; `attention/coded.py` says what they look like."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = torch.float16
"""The dtype of scales and zero points."""


def bytes_of(size: int, bits: int) -> int:
    """The bytes of the codes of so many numbers."""
    return size * bits // 8


@torch.no_grad()
def encode(vectors: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """The codes of vectors.

    The grid of a group spans its numbers. It is then fitted to them once, by least squares, given
    their codes; that loses a sixth less than the span itself.

    Args:
        vectors: `[..., D]` float.
        bits: 8, 5 or 4.
        group: numbers that share a grid; it divides D.

    Returns:
        codes `[..., n]` uint8 and grids `[..., 2 * D / group]`; see `Coded`. What is not finite, or
        beyond half precision, is read back as not finite, with its vector.
    """
    groups = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    groups = groups.unflatten(-1, (-1, group))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    most = 2**bits - 1
    scale, zero = _in_half((high - low) / most, low)
    codes = _nearest(groups, scale, zero, most)
    mean, middle = codes.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
    away = codes - mean
    fitted = (away * groups).sum(-1, keepdim=True) / away.square().sum(-1, keepdim=True)
    # Where all codes are the same there is nothing to fit.
    fitted = torch.where(fitted.isfinite(), fitted, scale)
    scale, zero = _in_half(fitted, middle - fitted * mean)
    codes = _nearest(groups, scale, zero, most).to(torch.uint8).flatten(-2)
    grid = torch.cat([scale, zero], -2).flatten(-2).to(HALF)
    return _packed(codes, bits), grid


def _in_half(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    return scale.to(HALF).to(scale.dtype), zero.to(HALF).to(zero.dtype)


def _nearest(groups: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
    """The number of the nearest point of each grid, as float."""
    # A group of equal numbers has a scale of 0: all of them are its zero point.
    return ((groups - zero) / scale).nan_to_num_(0).round_().clamp_(0, most)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """`[..., D]` codes, a byte each, in so many bits."""
    if bits == 8:
        return codes
    first, second = (codes & 15).chunk(2, -1)
    nibbles = first | (second << 4)
    if bits == 4:
        return nibbles
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    upper = ((codes >> 4).unflatten(-1, (8, -1)) << places[:, None]).sum(-2, dtype=torch.uint8)
    return torch.cat([nibbles, upper], -1)
