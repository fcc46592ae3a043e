"""Hadamard's rotation of vectors, which spreads what is large in one number over all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.devices import without_autocast
from .constants import constant


def hadamard(vectors: Tensor) -> Tensor:
    """Vectors `[..., D]` turned by Hadamard's matrix; the same once more turns them back.

    Where D is no power of two, in blocks of the largest power of two that divides it. Lengths, and
    products of two turned vectors, stay as they are. Computed in float32 at least.

    Source: the randomness-free rotation of QuaRot (arXiv 2404.00456, section 3).
    """
    size = vectors.shape[-1]
    block = size & -size
    if block == 1:
        return vectors
    wide = torch.promote_types(vectors.dtype, torch.float32)
    matrix = constant(_hadamard_matrix, block, wide, vectors.device)
    with without_autocast(vectors.device):
        if block == size:
            return (vectors.to(wide) @ matrix).to(vectors.dtype)
        turned = vectors.to(wide).unflatten(-1, (size // block, block)) @ matrix
    return turned.flatten(-2).to(vectors.dtype)


def _hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix `[size, size]`, symmetric, and its own inverse."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        above = torch.cat([matrix, matrix], 1)
        matrix = torch.cat([above, torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5
