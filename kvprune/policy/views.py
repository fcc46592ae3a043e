"""Views: what a policy is shown of tokens and of slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch import distributed as dist

from ..errors import KVPruneError
from ..models.structure import output_weight
from ..statistics import Queries, Statistic, parts_of
from .budget import Lengths, newest
from .moment import Moment
from .rotary import Rotary
from .stored import Stored


class Statistics:
    """What was observed; asking for what a policy did not name is an error.

    Args:
        values: what is held, by the statistics that others are made of.
        looks: gives what newest queries give to the view's entries, None where it is not known.
        named: the statistics that may be asked for; None for all.
    """

    def __init__(
        self,
        values: Mapping[Statistic, Any],
        looks: Callable[[Queries], Tensor | None] | None = None,
        named: tuple[Statistic, ...] | None = None,
    ) -> None:
        self._values, self._looks, self._named = values, looks, named

    def only(self, named: tuple[Statistic, ...]) -> Statistics:
        """The statistics that a policy named; it does not see what others want."""
        parts = {part: self._values[part] for part in parts_of(named) if part in self._values}
        return Statistics(parts, self._looks, named)

    def tensors(self) -> Iterator[tuple[Statistic, Tensor]]:
        """All that is held, each tensor with the statistic that it belongs to."""
        for part, value in self._values.items():
            for tensor in value if isinstance(value, tuple) else (value,):
                yield part, tensor

    def with_slots(self, change: Callable[[Tensor], Tensor]) -> Statistics:
        """The same with something done to each number per slot `[B, Hkv, S]`."""
        changed = {
            part: change(value) if part.per == "slot" else value
            for part, value in self._values.items()
        }
        looks = self._looks

        def changed_looks(queries: Queries) -> Tensor | None:
            found = None if looks is None else looks(queries)
            return None if found is None else change(found)

        return Statistics(changed, changed_looks, self._named)

    def renewed(self, values: Mapping[Statistic, Any]) -> Statistics:
        """The same looks, with other values."""
        return Statistics(values, self._looks, self._named)

    def __call__(self, statistic: Statistic) -> Any:
        held = [self._values.get(part) for part in self._parts(statistic)]
        if any(each is None for each in held):
            raise self._not_observed(statistic)
        return statistic.value(*held)

    def looks(self, count: int) -> Tensor:
        """See `SlotView.looks`."""
        queries = Queries(count)
        self._parts(queries)
        found = None if self._looks is None else self._looks(queries)
        if found is None:
            raise self._not_observed(queries)
        return found

    def _parts(self, statistic: Statistic) -> tuple[Statistic, ...]:
        """The parts of a statistic that may be asked for."""
        known = isinstance(statistic, Statistic)
        if not known or (self._named is not None and statistic not in self._named):
            raise self._not_observed(statistic)
        return statistic.parts

    def _not_observed(self, statistic: Any) -> KVPruneError:
        named = list(self._values) if self._named is None else list(self._named)
        if statistic in named:
            return KVPruneError(
                f"nothing of {statistic!r} is known here: before layer 0, and behind a layer "
                f"without attention, hidden states have no statistics; those of a layer end with "
                f"the prompt, unless a policy asks for them later. Return None there, to keep "
                f"everything"
            )
        expected = f"one of {named}" if named else "a policy that names one"
        return KVPruneError(
            f"statistic {statistic!r} was not observed here: expected {expected}. Name it in the "
            f"policy's class attribute `statistics`"
        )


class _View:
    """What both views say. Of amounts, an int counts tokens, and a float is a share of a row's."""

    lengths: Lengths
    columns: Tensor
    valid: Tensor
    first: Tensor
    begin: Callable[[int], Tensor] | None
    statistic: Statistics

    def looks(self, count: int) -> Tensor:
        """The probabilities that the newest `count` queries give to the entries; see the view.

        Raises:
            KVPruneError: `Queries(count)` is not among the policy's statistics, or not observed.
        """
        return self.statistic.looks(count)

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
class TokenView(_View):
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
    statistic(which): of statistics per slot `[B, Hkv, Q]`, what these tokens got in the layer
        before, from the queries of this forward, as `tokens.statistic(Attention())`.
    order: `[B, 1, Q]` int64, the tokens by column, those that are not valid first.
    looks(w): `[B, Hkv, G, w, Q]`, what the newest w queries of the layer before gave these tokens,
        where `Queries(w)` is among the policy's statistics.
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

    @property
    def order(self) -> Tensor:
        """See above."""
        return self.columns.masked_fill(~self.valid, -1).argsort(dim=-1, stable=True)[:, None]


@dataclass(frozen=True)
class SlotView(_View):
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
    heads: key/value heads, Hkv.
    keys, values: `[B, Hkv, S, D]`, rotated as attention had them in this forward, and read from
        where they are held when they are asked for; withheld from a policy that promises
        `layers_alike`.
    statistic(which): of statistics per slot `[B, Hkv, S]`, since the slot's column was read, as
        `slots.statistic(Attention())`; of statistics per layer what they say.
    looks(w): `[B, Hkv, G, w, S]`, the probabilities that the newest w queries give to the slots, by
        the model's own rule (scaling, soft-capping, sinks, windows, padding), where `Queries(w)` is
        among the policy's statistics; w is less where fewer were read. In order, the newest last;
        0 for a query that a row does not have.
    order: `[B, 1|Hkv, S]` int64, the slots by column, those that are not valid first.
    positions: `[B, 1|Hkv, S]` int64, the number of the slot's token in its row, from 0, padding not
        counted; -1 where not valid.
    first_head: the number of the first head among those of all processes.
    new: columns of this forward.
    left: columns of the announced prompt that are still to come.
    since: columns since the prompt's end, 0 where it ends with these.
    output_weight: `[Hkv, G, Dv, C]`, what a value is multiplied with on its way out of the layer's
        attention (W_o), by key/value head and query head; read only, without a bias.
    group: as in `TokenView`; Hkv are then the heads of this process.
    scaling: what attention multiplies products of queries and keys with. This and the next two
        where the policy names `Rotations()` or `QueryMoments()`; scaling with `Queries(w)` too.
    rotary: how the layer turns queries and keys by their position.
    position: `[B]`, the position of each row's newest token, as the model knows it.
    window: how many columns the layer's queries see (sliding or chunked attention); None for all.
    heads_part: whether some policy may leave heads with different tokens; the same everywhere.
    """

    layer: int
    num_layers: int
    columns: Tensor
    valid: Tensor
    first: Tensor
    seen: int
    moment: Moment = field(repr=False)
    lengths: Lengths = field(repr=False)
    stored: Stored = field(repr=False)
    statistic: Statistics = field(repr=False)
    group: Any = field(default=None, repr=False)
    begin: Callable[[int], Tensor] | None = field(default=None, repr=False)
    numbers_of: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    queried: Any = field(default=None, repr=False)
    window: int | None = None
    attention: Any = field(default=None, repr=False)
    heads_part: bool = field(default=False, repr=False)

    @property
    def order(self) -> Tensor:
        """See above."""
        return self.columns.masked_fill(~self.valid, -1).argsort(dim=-1, stable=True)

    @property
    def heads(self) -> int:
        """See above."""
        return self.stored.heads

    @property
    def keys(self) -> Tensor:
        """See above."""
        return self.stored.read("keys")

    @property
    def values(self) -> Tensor:
        """See above."""
        return self.stored.read("values")

    @property
    def positions(self) -> Tensor:
        """See above."""
        columns = self.columns.masked_fill(~self.valid, -1)
        if self.numbers_of is not None:
            return self.numbers_of(columns)
        return (columns - self.first[:, None, None]).masked_fill(columns < 0, -1)

    @property
    def first_head(self) -> int:
        """See above."""
        return 0 if self.group is None else dist.get_rank(self.group) * self.heads

    @property
    def scaling(self) -> float:
        """See above."""
        found: float = self._of_queries("scaling")
        return found

    @property
    def rotary(self) -> Rotary:
        """See above."""
        found: Rotary = self._of_queries("rotary")
        return found

    @property
    def position(self) -> Tensor:
        """See above."""
        found: Tensor = self._of_queries("position")
        return found

    def _of_queries(self, name: str) -> Any:
        found = getattr(self.queried, name, None)
        if found is None:
            raise KVPruneError(
                f"slots.{name}: expected a policy with statistics = (Rotations(), ...), or another "
                f"statistic of queries, out of kvprune.statistics"
            )
        return found

    @property
    def output_weight(self) -> Tensor:
        """See above.

        Raises:
            KVPruneError: the model's attention has no projection that is known.
        """
        # Where layers evict together, values are refused, with the promise that was broken.
        size = self.values.shape[-1]
        if self.attention is None:
            raise KVPruneError("output_weight: known in a forward of the model alone")
        return output_weight(self.attention).unflatten(0, (self.heads, -1, size))

    @property
    def prompt_length(self) -> Tensor:
        """See above."""
        return self.lengths.tensor

    @property
    def new(self) -> int:
        """See above."""
        return self.moment.new

    @property
    def left(self) -> int:
        """See above."""
        return self.moment.left

    @property
    def since(self) -> int:
        """See above."""
        return self.moment.since
