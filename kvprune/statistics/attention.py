"""What slots receive of the attention: softmax probabilities over the slots then present."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import KVPruneError
from .base import Block, Statistic

OVER = ("sum", "max", "mean")


@dataclass(frozen=True)
class Attention(Statistic):
    """The probabilities that a slot has received since its column was read, `[B, Hkv, S]`.

    Over all queries so far and the query heads of its key/value head. Padding does not vote.

    Args:
        over: "sum", "max", or "mean" over the queries that could see the slot, where some were
            pruned before this layer too (and over them alone: query heads are added up).
        decay: what earlier probabilities are multiplied by with each later query of the row, from
            0 to 1; 0 leaves the newest query alone. Not for "mean".

    Raises:
        KVPruneError: another `over`, or a decay that is not between 0 and 1.

    Nothing n x n is held. A sum without decay comes out of the attention kernels; what else is
    wanted of many queries takes a second look at them, block by block.
    """

    over: str = "sum"
    decay: float = 1.0

    checked: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.over not in OVER:
            raise KVPruneError(f"Attention(over={self.over!r}): expected 'sum', 'max' or 'mean'")
        number = isinstance(self.decay, (int, float)) and not isinstance(self.decay, bool)
        if not number or not 0 <= self.decay <= 1:
            raise KVPruneError(f"Attention(decay={self.decay!r}): expected a number from 0 to 1")
        if self.over == "mean" and self.decay != 1:
            raise KVPruneError(
                f"Attention(over='mean', decay={self.decay!r}): expected decay=1.0, as a mean is "
                f"over all queries that could see a slot. Use over='sum' with a decay"
            )

    @property
    def parts(self) -> tuple[Statistic, ...]:
        """A mean is a sum, and how many queries it is of."""
        return (Attention(), Views()) if self.over == "mean" else (self,)

    @property
    def reads(self) -> str:  # type: ignore[override]
        """A plain sum needs no probabilities one by one."""
        return "received" if self.over == "sum" and self.decay == 1 else "probabilities"

    @property
    def adds(self) -> bool:  # type: ignore[override]
        """Whether this is the plain sum."""
        return self.reads == "received"

    @property
    def newest(self) -> int | None:  # type: ignore[override]
        """With a decay of 0 the newest query alone."""
        return 1 if self.decay == 0 else None

    def join(self, held: Tensor, new: Tensor | Block) -> Tensor:
        """Adds what a forward gave, or goes on with a block."""
        if isinstance(new, Tensor):
            return held + new
        given = new.probabilities
        if self.decay != 1 and given.shape[3] > 1:
            # A query of padding gives 0 already.
            weights = self.decay ** new.later.to(held.dtype)
            given = given * weights[:, None, None, :, None]
        given = given.amax((2, 3)) if self.over == "max" else given.sum((2, 3))
        if self.decay == 0 and new.complete:
            # A query in every row: what was known before it is forgotten.
            return given
        if self.decay != 1:
            held = held * (self.decay ** new.count.to(held.dtype))[:, None, None]
        return held.maximum(given) if self.over == "max" else held + given

    def value(self, *held: Tensor) -> Tensor:
        """The number itself; of a mean the quotient."""
        if self.over != "mean":
            return held[0]
        received, views = held
        return received / views.clamp(min=1)


@dataclass(frozen=True)
class Views(Statistic):
    """How many queries could see a slot since its column was read, `[B, Hkv, S]`."""

    reads: ClassVar[str] = "views"
    adds: ClassVar[bool] = True
    checked: ClassVar[bool] = False

    def join(self, held: Tensor, new: Tensor) -> Tensor:
        """Adds them up."""
        return held + new
