"""The base of what holds keys and values: buffers `[B, Hkv, capacity, n]`, one place a slot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Self

import torch
from torch import Tensor

from .buffers import gathered, watched


class Held:
    """Keys and values of slots, in buffers with room for more slots than are in use.

    Args:
        buffers: each `[B, Hkv, capacity, n]`.
    """

    def __init__(self, *buffers: Tensor) -> None:
        self.buffers = buffers

    @property
    def heads(self) -> int:
        """Key/value heads, Hkv."""
        return self.buffers[0].shape[1]

    def with_buffers(self, buffers: Iterable[Tensor]) -> Self:
        """Other slots, held in the same way."""
        twin = copy.copy(self)
        twin.buffers = tuple(buffers)
        return twin

    def _write(self, write: Callable[[Tensor, Tensor], Tensor], *new: Tensor) -> None:
        """Writes to each buffer what is new for it."""
        self.buffers = tuple(map(write, self.buffers, new))

    def gather(self, order: Tensor) -> None:
        """Goes on with the slots `order` `[B, 1|Hkv, n]` alone, in that order, and one to spare."""
        spare = 0 if watched(*self.buffers) else 1
        self.buffers = tuple(gathered(each, order, spare) for each in self.buffers)

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        self.buffers = tuple(each.index_select(0, rows) for each in self.buffers)

    def move(self, device: torch.device | str) -> None:
        """Moves everything to a device, without waiting for it."""
        self.buffers = tuple(each.to(device, non_blocking=True) for each in self.buffers)

    def tensors(self) -> Iterator[Tensor]:
        """All that is held, for counting bytes."""
        yield from self.buffers
