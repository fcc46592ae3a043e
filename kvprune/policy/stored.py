"""Keys and values of a view's slots, which may have to be made before they can be read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import KVPruneError


class Stored:
    """The keys and values of a view's slots, read when they are asked for.

    Args:
        heads: key/value heads, Hkv.
        read: gives keys `[B, Hkv, S, D]` or values `[B, Hkv, S, Dv]`, by name.
        last: the one that was read last, of several whose keys and values would take much room
            together: it forgets them when another is read. None to forget nothing.

    Attributes:
        made: what was asked for so far, by name.
    """

    def __init__(
        self, heads: int, read: Callable[[str], Tensor], last: list[Stored] | None = None
    ) -> None:
        self.heads, self._read, self._last = heads, read, last
        self.made: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """Keys or values, by name; made at the first call."""
        if self._last is not None and (not self._last or self._last[0] is not self):
            for other in self._last:
                other.made.clear()
            self._last[:] = [self]
        if name not in self.made:
            self.made[name] = newly_counted(self._read(name).detach())
        return self.made[name]


def newly_counted(tensor: Tensor) -> Tensor:
    """The same numbers with a counter from 0, which tells whether somebody writes to them.

    What torch makes of a tensor out of inference mode may have been counted up already.
    """
    # Compiled code knows no counters.
    return tensor if torch.compiler.is_compiling() else tensor.data


def withheld(heads: int) -> Stored:
    """Stands for what a policy promised not to look at."""
    return Stored(heads, _refuse)


def _refuse(name: str) -> Tensor:
    raise KVPruneError(
        f"{name} were asked for by a policy that promises `layers_alike`, to rank by what is the "
        f"same question for every layer: expected layers_alike = False"
    )
