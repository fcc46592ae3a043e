"""Rotary: what an author may know of a layer's positions."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Rotary(Protocol):
    """The rotation of one layer's queries and keys by their position (RoPE).

    A layer that turns nothing has one too, which leaves all as it is.
    """

    def angles(self, by: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[..., R / 2]` of positions `[...]`, in the precision of `keys`.

        R are the dimensions that are turned. The mean of a rotation over positions is that of its
        cosines and sines.
        """

    def turned(self, keys: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Vectors `[B, H, n, D]` turned by cosine and sine `[B, 1|H, 1|n, R / 2]`."""
