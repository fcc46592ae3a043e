"""Views: what a policy is shown of tokens and of slots."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import KVPruneError
from .budget import Lengths, newest


class Statistics:
    """A view's statistics by name; asking for one that was not named is an error."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values

    def only(self, names: Collection[str]) -> Statistics:
        """The statistics that a policy named; it does not see what others want."""
        return Statistics({n: self._values[n] for n in names if n in self._values})

    def items(self) -> Iterable[tuple[str, Tensor]]:
        """Each by its name."""
        return self._values.items()

    def __call__(self, name: str) -> Tensor:
        if name not in self._values:
            raise KVPruneError(
                f"statistic {name!r} was not observed here: expected one of "
                f"{sorted(self._values)}. Name it in the policy's class attribute "
                f"`statistics`; before layer 0 there is none."
            )
        return self._values[name]


class _Withheld:
    """Stands for the keys and values of a view whose policy promised not to look at them."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise KVPruneError(
            f"keys and values (.{name}) were asked for by a policy that promises `layers_alike`, "
            f"to rank by what is the same question for every layer: expected layers_alike = False"
        )


WITHHELD: Any = _Withheld()


class _Amounts:
    """Amounts in both views: an int counts tokens, a float is a share of a row's."""

    lengths: Lengths
    columns: Tensor
    valid: Tensor
    first: Tensor
    begin: Callable[[int], Tensor] | None

    def tokens(self, amount: int | float) -> Tensor:
        """The amount in tokens of each row, `[B]` int64; see `Budget.of`. Read only."""
        return self.lengths.tokens(amount)

    def newest(self, amount: int | float) -> Tensor:
        """The newest `amount` entries: `[B, 1|H, S]` bool, all valid ones if there are fewer."""
        columns = self.columns if self.columns.dim() == 3 else self.columns[:, None]
        return newest(columns, self.tokens(amount), self.lengths.ends(amount))

    def oldest(self, count: int) -> Tensor:
        """The entries among their row's first `count` tokens (sinks): `[B, 1|H, S]` bool.

        Of all that the row was ever handed: those that are gone are not made up for.
        """
        end = self.first + count if self.begin is None else self.begin(count)
        if self.columns.dim() == 3:
            return self.valid & (self.columns < end[:, None, None])
        return (self.valid & (self.columns < end[:, None]))[:, None]


@dataclass(frozen=True)
class TokenView(_Amounts):
    """The hidden tokens about to enter a decoder layer; read only, and writing to it is refused.

    layer: the decoder layer, from 0.
    num_layers: decoder layers of the model.
    hidden: `[B, Q, C]`, hidden states.
    columns: `[B, Q]` int64, -1 where not valid.
    valid: `[B, Q]` bool.
    first: `[B]`, each row's first valid column.
    length: `[B]`, each row's valid tokens in this forward before any pruning.
    tokens(amount): `[B]` int64, tokens (an int) or a share of `length` (a float) as tokens.
    newest(amount): `[B, 1, Q]` bool, which are among the newest so many.
    oldest(count): `[B, 1, Q]` bool, which are among their row's first so many.
    statistic(name): `[B, Hkv, Q]`, what these tokens got in the previous layer, from the
        queries of this forward.
    group: the processes that share the heads of a tensor parallel model (see
        `kvprune.models.parallel`); None for one alone.
    """

    layer: int
    num_layers: int
    hidden: Tensor
    columns: Tensor
    valid: Tensor
    first: Tensor
    lengths: Lengths = field(repr=False)
    statistic: Statistics = field(repr=False)
    group: Any = field(default=None, repr=False)
    begin: Callable[[int], Tensor] | None = field(default=None, repr=False)

    @property
    def length(self) -> Tensor:
        """See above."""
        return self.lengths.tensor


@dataclass(frozen=True)
class SlotView(_Amounts):
    """One layer's slots after its attention, in no order; read only, and writing to it is refused.

    layer: the decoder layer, from 0.
    num_layers: decoder layers of the model.
    columns: `[B, 1|Hkv, S]` int64, -1 where not valid.
    valid: `[B, 1|Hkv, S]` bool.
    first: `[B]`, each row's first valid column.
    seen: columns shown so far, this forward included.
    prompt_length: `[B]`, each row's valid prompt tokens, all turns together.
    tokens(amount): `[B]` int64, tokens (an int) or a share of `prompt_length` (a float) as tokens.
    newest(amount): `[B, 1|Hkv, S]` bool, which are among the newest so many.
    oldest(count): `[B, 1|Hkv, S]` bool, which are among their row's first so many.
    keys, values: `[B, Hkv, S, D]`, rotated as the model stores them; withheld from a policy that
        promises `layers_alike`.
    statistic(name): `[B, Hkv, S]`, accumulated since the slot's column was read.
    group: as in `TokenView`; Hkv are then the heads of this process.
    """

    layer: int
    num_layers: int
    columns: Tensor
    valid: Tensor
    first: Tensor
    seen: int
    lengths: Lengths = field(repr=False)
    keys: Tensor
    values: Tensor
    statistic: Statistics = field(repr=False)
    group: Any = field(default=None, repr=False)
    begin: Callable[[int], Tensor] | None = field(default=None, repr=False)

    @property
    def prompt_length(self) -> Tensor:
        """See above."""
        return self.lengths.tensor
