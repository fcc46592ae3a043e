"""Attention that repeats its key/value heads as a whole, one copy after the other (JetMoE).

Query head i then reads key/value head i modulo their number. Everywhere else here neighbouring
query heads read the same one, so queries are put in that order first, and outputs back after it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .families import copies_of_heads


def neighbours(tensor: Tensor, copies: int, axis: int = 1) -> Tensor:
    """Query heads in the order (key/value head, copy), from (copy, key/value head)."""
    return _swapped(tensor, copies, tensor.shape[axis] // copies, axis)


def as_before(tensor: Tensor, copies: int, axis: int) -> Tensor:
    """Undoes `neighbours`."""
    return _swapped(tensor, tensor.shape[axis] // copies, copies, axis)


def _swapped(tensor: Tensor, outer: int, inner: int, axis: int) -> Tensor:
    return tensor.unflatten(axis, (outer, inner)).transpose(axis, axis + 1).flatten(axis, axis + 1)


def without_copies(tensor: Tensor, copies: int) -> Tensor:
    """Key/value heads `[B, H * copies, S, D]` as they were stored, `[B, H, S, D]`."""
    return tensor[:, : tensor.shape[1] // copies]


def for_backend(module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, H, S, D]` as the module's backend wants them.

    One that knows of no groups of query heads is handed a head for each.
    """
    copies = copies_of_heads(module)
    if copies == 1:
        return key, value
    return key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
