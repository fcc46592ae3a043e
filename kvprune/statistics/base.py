"""The interface of statistics, and what they are made of.

A statistic is a frozen object, by which a policy says what it wants observed and asks for it. Equal
ones are observed once, whoever asks. It holds no state: what was observed lives with the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import KVPruneError

READS_OF = {
    "slot": ("received", "views", "probabilities", "hidden", "survival", "second reading"),
    "layer": ("queries", "unrotated", "rotations"),
}
"""By what a statistic is per: what it can read."""


@dataclass(frozen=True, eq=False)
class Block:
    """Some queries of one forward at one layer, and what they gave to the slots then present.

    probabilities: `[B, Hkv, G, n, S]`, after the softmax, detached; 0 where a query may not see a
        slot, and for padding.
    columns: `[B, n]` int64, of the queries, in order, -1 for padding.
    slots: `[B, 1|Hkv, S]` int64, columns of the slots, -1 where empty.
    complete: it is known that no query is padding.
    numbers_of: from columns `[B, H, n]` to the numbers of their tokens in their rows; None in a
        block that was made by hand, where columns are taken for these.
    """

    probabilities: Tensor
    columns: Tensor
    slots: Tensor
    complete: bool = False
    numbers_of: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    @property
    def positions(self) -> Tensor:
        """`[B, n]` int64, the numbers of the queries' tokens in their rows; -1 for padding.

        From 0, padding not counted. What counts how far apart tokens are goes by these and by
        `slot_positions`, since a row may have padding between its turns.
        """
        columns = self.columns
        return columns if self.numbers_of is None else self.numbers_of(columns[:, None])[:, 0]

    @property
    def slot_positions(self) -> Tensor:
        """`[B, 1|Hkv, S]` int64, the same of the slots' tokens; -1 where empty."""
        return self.slots if self.numbers_of is None else self.numbers_of(self.slots)

    @property
    def count(self) -> Tensor:
        """`[B]` int64, the row's queries in this block."""
        return (self.columns >= 0).sum(-1)

    @property
    def later(self) -> Tensor:
        """`[B, n]` int64, for each query the row's queries behind it in this block."""
        valid = (self.columns >= 0).long()
        return valid.flip(-1).cumsum(-1).flip(-1) - valid


@dataclass(frozen=True)
class Statistic:
    """Base of all statistics: derive a frozen dataclass from it, in any package.

    Class attributes:
        per: "slot": a float for each slot and key/value head, `[B, Hkv, S]`, which moves, is saved
            and vanishes with its slot. "layer": tensors of a layer, whose first axis are the rows;
            they are freed once no policy can ask before the next prompt, and begin anew there.
        reads: what `join` is handed. For slots "received", the probabilities that each slot
            received in a forward, added up over the queries, `[B, Hkv, S]`; "views", the number of
            queries in a forward that could see the slot, the same shape; "probabilities", one
            `Block` of queries after another, in order; "hidden", what `numbers` says of the tokens
            that were written; "survival", how far tokens came through pruning; "second reading",
            what tokens that are read again give (`SecondReading`). The last three are
            `[B, 1|Hkv, S]`, NaN (of a second reading +inf) for slots that nothing is said of. For
            layers "queries", as attention is handed them (with positions inside the cache as if
            their tokens stood at position 0); "unrotated", before their position turned
            them (RoPE); "rotations", nothing.
        start: the number that a slot begins with.
        newest: how many of a forward's newest queries matter, for "probabilities"; None for all.
            Where it is small, attention runs as if nothing were observed.
        adds: whether `join` is `held + new`, which the engine may then do in place.
        checked: whether the engine looks for NaN in what `join` returns, in forwards of several
            tokens.
    """

    per: ClassVar[str] = "slot"
    reads: ClassVar[str] = "received"
    start: ClassVar[float] = 0.0
    newest: ClassVar[int | None] = None
    adds: ClassVar[bool] = False
    checked: ClassVar[bool] = True

    def __deepcopy__(self, memo: Any) -> Self:
        # It holds nothing of a sequence, and a copy of what it holds (a module) is not equal.
        return self

    @property
    def of_attention(self) -> bool:
        """Whether it is a number per slot that attention gives."""
        return self.reads in ("received", "views", "probabilities")

    @property
    def parts(self) -> tuple[Statistic, ...]:
        """The statistics that are held for this one; itself, unless it is made of others."""
        return (self,)

    def join(self, held: Any, new: Any) -> Any:
        """What is held after a forward, or a block of it; per layer after one or more forwards.

        Args:
            held: `[B, Hkv, S]`, where it is per slot. Where it is per layer a tuple of tensors; an
                empty one before the first forward.
            new: see `reads`. For "queries" a pair: `[B, Hq, Q, D]`, and their columns `[B, Q]`
                int64, -1 for padding. For "unrotated" likewise, with the numbers of the tokens in
                their rows, from 0, in place of columns, and queries in float32 at least. In
                decoding the queries of many forwards may come at once, in order, before anybody
                reads what is held. It must not be written to.

        Returns:
            what replaces `held`, of the same form; not the same tensors written to.
        """
        raise KVPruneError(f"{self!r}: expected a statistic with a method join(held, new)")

    def numbers(self, hidden: Tensor, layer: int) -> Tensor:
        """What is said of new tokens, where "hidden" is read.

        Args:
            hidden: `[B, Q, C]`, detached, what enters the decoder layer.
            layer: its number.

        Returns:
            `[B, 1|Hkv, Q]` floats.
        """
        raise KVPruneError(f"{self!r}: expected a statistic with a method numbers(hidden, layer)")

    def value(self, *held: Any) -> Any:
        """What a policy is shown, from what is held for each of `parts`."""
        return held[0]


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 whatever the precision of keys, float64 where that is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parts_of(statistics: Iterable[Statistic]) -> tuple[Statistic, ...]:
    """What is held for these, each once."""
    return tuple(dict.fromkeys(part for statistic in statistics for part in statistic.parts))


def check_statistics(wanted: Any, what: str) -> None:
    """Refuses what is no tuple of statistics.

    Args:
        wanted: what was given.
        what: who asks, for the error.

    Raises:
        KVPruneError: not a tuple of `Statistic` objects that can be observed.
    """
    if isinstance(wanted, tuple) and all(isinstance(each, Statistic) for each in wanted):
        for part in parts_of(wanted):
            _check_part(part, what)
        return
    raise KVPruneError(
        f"{what} = {wanted!r}: expected a tuple of objects out of kvprune.statistics, as "
        f"(Attention(),), or of your own that derive from kvprune.statistics.Statistic"
    )


def _check_part(part: Statistic, what: str) -> None:
    if part.reads not in READS_OF.get(part.per, ()):
        raise KVPruneError(
            f"{what}: {part!r} has per={part.per!r} and reads={part.reads!r}: expected per 'slot' "
            f"with reads {', '.join(map(repr, READS_OF['slot']))}, or per 'layer' with reads "
            f"{', '.join(map(repr, READS_OF['layer']))}"
        )
    if part.reads == "second reading" and not hasattr(part, "repeats"):
        raise KVPruneError(
            f"{what}: {part!r} reads a second reading: expected a statistic that derives from "
            f"kvprune.statistics.SecondReading"
        )
    if type(part).join is Statistic.join:
        raise KVPruneError(f"{what}: {part!r}: expected a statistic with a method join(held, new)")
    try:
        hash(part)
    except TypeError as error:
        raise KVPruneError(
            f"{what}: {type(part).__name__} cannot be hashed ({error}): expected a frozen "
            f"dataclass with fields such as numbers and texts"
        ) from error
