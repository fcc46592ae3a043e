"""One layer's slots: one rectangle, or several where heads or rows keep different numbers."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention.coded import Coded
from ..attention.inputs import Piece, Pieces
from ..attention.lanes import Lanes
from ..errors import KVPruneError
from ..models.structure import Local
from ..statistics import Statistic
from .buffers import numbers_at, put
from .layout import allowed, cells, rearranged
from .plain import Plain
from .quantized import QuantizedSlots
from .rectangle import Past, Rectangle, Store, described, joined, united


@dataclass(frozen=True)
class _Record:
    """What a layer held, to come back to: by rectangle, and the statistics per layer."""

    rectangles: list[Past]
    records: dict[Statistic, tuple[Tensor, ...]]


class SlotLayer:
    """Slots of one layer, for all rows of a batch: columns, numbers, and held keys and values.

    The layer is a rectangle, or several; whoever reads `columns`, `statistics`, `keys` or `values`
    sees one in any case, with empty slots, whose column is -1, where a lane has fewer. Slots come
    in no order, but those of several new tokens are the last ones, in order.

    Args:
        statistics: what is observed here, per slot or per layer.
        local: what the layer's queries can see; None for everything.
        arrivals: whether slots keep the position that their key came with.
        store: makes what holds keys and values.
        direct: whether attention is handed keys and values as `update` returns them.
        divides: whether the layer may become several rectangles.

    Attributes:
        parts: the statistics per slot.
        layer_parts: the statistics per layer.
        records: what is held of the latter; those of which nothing is held are left out.
        local, store, direct, divides: see above.
        rectangles: one, or several.
        lanes: which rows and heads stand in which rectangle; None for one.
        seen: the cache's logical length, as far as the layer knows it.
        whole: it is known that the layer lacks no valid token that was read.
    """

    # What transformers asks of a cache's layers. What is evicted cannot come back, and a layer
    # learns of its heads from its first tokens.
    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        statistics: tuple[Statistic, ...] = (),
        local: Local | None = None,
        arrivals: bool = False,
        store: Store = Plain,
        direct: bool = True,
        divides: bool = False,
    ) -> None:
        self.store, self.direct = store, direct
        self.parts = tuple(s for s in statistics if s.per == "slot")
        self.layer_parts = tuple(s for s in statistics if s.per == "layer")
        self.local = local
        self._arrivals, self.divides = arrivals, divides
        self.reset()

    def reset(self) -> None:
        """Forgets everything and frees the buffers."""
        self.seen = 0
        self.whole = True
        self.rectangles = [Rectangle(self.store, self.parts, self._arrivals)]
        self.lanes: Lanes | None = None
        self.records: dict[Statistic, tuple[Tensor, ...]] = {}
        self._record: list[_Record] = []

    # What there is.

    @property
    def is_initialized(self) -> bool:
        """Whether anything was stored yet."""
        return self.rectangles[0].held is not None

    @property
    def _held(self) -> Plain | QuantizedSlots:
        """Keys and values of the first rectangle; of the same kind in all."""
        # As layers of transformers have it: no such attribute before the first tokens.
        if self.rectangles[0].held is None:
            raise AttributeError("expected a layer with tokens")
        return self.rectangles[0].held

    @property
    def device(self) -> torch.device:
        """The device of the layer."""
        if self.rectangles[0].held_columns is None:
            raise AttributeError("device")
        return self.rectangles[0].held_columns.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self._held.dtype

    @property
    def made_anew(self) -> bool:
        """Whether `keys` and `values` are made when they are read."""
        return self.lanes is not None or isinstance(self.rectangles[0].held, QuantizedSlots)

    @property
    def heads(self) -> int:
        """The key/value heads that are stored, Hkv."""
        return self._held.heads if self.lanes is None else self.lanes.heads

    @property
    def used(self) -> int:
        """Slots in use, S."""
        return max(each.used for each in self.rectangles)

    @property
    def in_use(self) -> int:
        """Slots of a row and head before the next token is stored, a mean over these, rounded.

        A free slot does not count: the next token takes it.
        """
        counts, lanes = [one.used - (one.turnover.slot is not None) for one in self.rectangles], 1
        if self.lanes is not None:
            numbers = self.lanes.numbers
            counts = [n * len(mine) for n, mine in zip(counts, numbers, strict=True)]
            lanes = sum(map(len, numbers))
        return round(sum(counts) / lanes)

    @property
    def complete(self) -> bool:
        """Whether it is known that no slot in use is empty."""
        return self.lanes is None and self.rectangles[0].complete

    @property
    def full_for(self) -> int | None:
        """The policy that is full; see `Turnover.policy`."""
        return self.rectangles[0].turnover.policy

    @property
    def columns(self) -> Tensor:
        """`[B, 1|Hkv, S]` int64, -1 for an empty slot."""
        if self.lanes is None:
            return self.rectangles[0].columns
        return self.lanes.join([each.columns for each in self.rectangles], -1)

    @property
    def held_columns(self) -> Tensor:
        """`[B, 1|Hkv, n]` int64: `columns`, and behind them any room for more."""
        held = self.rectangles[0].held_columns
        return self.columns if held is None or self.lanes is not None else held

    @property
    def statistics(self) -> dict[Statistic, Tensor]:
        """Those per slot, each `[B, Hkv, S]`."""
        each = [rectangle.statistics for rectangle in self.rectangles]
        if self.lanes is None:
            return each[0]
        return {part: self.lanes.join([one[part] for one in each], 0) for part in each[0]}

    @property
    def arrived(self) -> Tensor:
        """The positions that the slots' keys came with, `[B, 1|Hkv, S]` int32, as `columns`."""
        each = [rectangle.arrived for rectangle in self.rectangles]
        if self.lanes is not None:
            each = [self.lanes.join(each, 0)]
        return each[0][:, : self.columns.shape[1]]

    @property
    def keys(self) -> Tensor:
        """`[B, Hkv, S, D]`; None before the first tokens, as in transformers."""
        return self._joined([each.keys for each in self._stored])  # type: ignore[return-value]

    @property
    def values(self) -> Tensor:
        """`[B, Hkv, S, Dv]`; None before the first tokens, as in transformers."""
        return self._joined([each.values for each in self._stored])  # type: ignore[return-value]

    @property
    def _stored(self) -> Sequence[Rectangle]:
        """The rectangles, once there is something in them."""
        return self.rectangles if self.is_initialized else ()

    def _joined(self, each: Sequence[Tensor]) -> Tensor | None:
        if self.lanes is None:
            return each[0] if each else None
        return self.lanes.join(each, 0)

    def turned(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the store turned them."""
        each = [_turned(rectangle) for rectangle in self.rectangles]
        if self.lanes is None:
            return each[0]
        keys, values = (self.lanes.join(same, 0) for same in zip(*each, strict=True))
        return keys, values

    def coded(self) -> tuple[Coded, Coded] | None:
        """Keys and values as codes; None where these are of several rectangles."""
        held = self.rectangles[0].held
        if self.lanes is not None or not isinstance(held, QuantizedSlots):
            return None
        return held.coded(self.rectangles[0].used)

    def pieces(self, codes: bool) -> Pieces | None:
        """What attention needs of each of several rectangles; None where there is one.

        Args:
            codes: whether what is held as codes is handed on as codes.
        """
        if self.lanes is None:
            return None
        each = tuple(_piece(rectangle, codes) for rectangle in self.rectangles)
        return Pieces(self.lanes, each)

    def get_seq_length(self) -> int:
        """The logical length, the same for all layers."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The logical length with so many tokens more, and an offset of 0."""
        return self.seen + query_length, 0

    def offload(self) -> None:
        """Moves keys and values to the CPU, until `prefetch`."""
        for rectangle in self._stored:
            assert rectangle.held is not None
            rectangle.held.move("cpu")

    def prefetch(self) -> None:
        """Brings keys and values back to where the layer is."""
        for rectangle in self._stored:
            assert rectangle.held is not None
            rectangle.held.move(self.device)

    def tensors(self) -> Iterator[Tensor]:
        """All that is held, for counting bytes."""
        for rectangle in self.rectangles:
            yield from rectangle.tensors()
        yield from () if self.lanes is None else self.lanes.tensors()
        for record in self.records.values():
            yield from record
        for past in self._record:
            for each in past.rectangles:
                yield from () if each.columns is None else (each.columns,)
                yield from each.statistics.values()
            for record in past.records.values():
                yield from record

    # As a file.

    def numbers(self) -> dict[str, Any]:
        """With `named_tensors`, all that brings the layer back as it is (see `restore`)."""
        first, *_ = each = [rectangle.numbers() for rectangle in self.rectangles]
        if self.lanes is None:
            return {**first, "whole": self.whole}
        lanes = self.lanes
        where = {"rows": lanes.rows, "heads": lanes.heads, "by_head": lanes.by_head}
        return {"whole": self.whole, **where, "lanes": lanes.numbers, "rectangles": each}

    def named_tensors(self) -> dict[str, Tensor]:
        """The slots in use, and free ones; `columns` is one object where layers share it."""
        each = [rectangle.named_tensors() for rectangle in self.rectangles]
        held = each[0] if self.lanes is None else _numbered(each)
        for part, record in self.records.items():
            held |= {f"records.{part!r}.{i}": tensor for i, tensor in enumerate(record)}
        return held

    def restore(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Becomes the layer whose `numbers` and `named_tensors` these are.

        Statistics that nobody wants here are left out.
        """
        self.whole = numbers["whole"]
        if "rectangles" not in numbers:
            self.rectangles[0].restore(numbers, tensors)
        else:
            first = next(iter(tensors.values()))
            where = numbers["rows"], numbers["heads"], numbers["by_head"]
            self.lanes = Lanes(*where, numbers["lanes"], first.device)
            each = self.lanes.numbers
            self.rectangles = [Rectangle(self.store, self.parts, self._arrivals) for _ in each]
            for i, rectangle in enumerate(self.rectangles):
                start = f"{i}."
                mine = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
                rectangle.restore(numbers["rectangles"][i], mine)
        for part in self.layer_parts:
            start = f"records.{part!r}."
            count = sum(name.startswith(start) for name in tensors)
            if count:
                self.records[part] = tuple(tensors[f"{start}{i}"] for i in range(count))

    # What statistics know.

    def narrow_statistics(self, statistics: tuple[Statistic, ...]) -> None:
        """Forgets all statistics but these."""
        self.parts = tuple(part for part in self.parts if part in statistics)
        self.layer_parts = tuple(part for part in self.layer_parts if part in statistics)
        for rectangle in self.rectangles:
            rectangle.narrow_statistics(self.parts)
        self.records = {n: value for n, value in self.records.items() if n in statistics}

    def observe(self, part: Statistic, new: Any, several: bool = False) -> None:
        """Joins what a forward gave to a statistic per slot.

        Args:
            part: the statistic.
            new: what `Statistic.join` is handed, detached.
            several: whether the forward has several tokens.

        Raises:
            KVPruneError: a statistic that is to be checked has another shape then, or NaN.
        """
        if self.lanes is None:
            self.rectangles[0].observe(part, new, several)
        elif part.adds:
            for rectangle, mine in self._apart(new):
                rectangle.observe(part, mine, several)
        else:
            # Of all rows and heads at once, as an author was promised.
            value = joined(part, self.statistics[part], new, several)
            for rectangle, mine in self._apart(value):
                rectangle.take(part, mine)

    def observe_tokens(self, part: Statistic, numbers: Tensor, columns: Tensor) -> None:
        """Joins numbers of tokens to a statistic per slot, also to what is recorded.

        Args:
            part: the statistic.
            numbers: `[B, 1|Hkv, n]`.
            columns: `[B, n]` int64, of the tokens, -1 for none.
        """
        self.observe(part, numbers_at(self.columns, numbers, columns))
        for record in self._record:
            if self.lanes is None:
                _join_tokens(record.rectangles[0], part, numbers, columns)
                continue
            each = (self.lanes.split(numbers), self.lanes.split(columns[:, None]))
            for past, *mine in zip(record.rectangles, *each, strict=True):
                _join_tokens(past, part, mine[0], mine[1][:, 0])

    def observe_queries(self, part: Statistic, queries: Tensor, columns: Tensor) -> None:
        """Joins a forward's queries to a statistic per layer; see `Statistic.join`.

        Raises:
            KVPruneError: the statistic is no tuple of tensors with an axis for the rows.
        """
        value = part.join(self.records.get(part, ()), (queries, columns))
        rows = columns.shape[0]
        tensors = isinstance(value, tuple) and all(isinstance(t, Tensor) for t in value)
        if not tensors or any(t.dim() == 0 or t.shape[0] != rows for t in value):
            raise KVPruneError(
                f"{part!r}: expected join() to return a tuple of tensors whose first axis are the "
                f"{rows} rows, got {described(value)}"
            )
        self.records[part] = value

    def forget_records(self, kept: Container[Statistic] = ()) -> None:
        """Frees the statistics per layer but for those that are named; they begin anew."""
        self.records = {part: held for part, held in self.records.items() if part in kept}

    # New tokens.

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        columns: Tensor,
        seen: int,
        complete: bool = True,
        whole: bool = True,
        in_free_slot: bool = False,
        arrived: Tensor | None = None,
    ) -> None:
        """Stores new tokens.

        Args:
            keys: `[B, Hkv, Q, D]`.
            values: `[B, Hkv, Q, Dv]`.
            columns: `[B, 1, Q]` int64, -1 for padding.
            seen: the cache's logical length then.
            complete: whether none of the columns is -1.
            whole: whether no token was pruned before this layer.
            in_free_slot: whether a single token may take the free slot, if there is one; else the
                new tokens come behind the others, in order.
            arrived: `[B, 1, Q]`, the positions that the keys came with; read with `arrivals`.
        """
        how = complete, in_free_slot and not self._record
        if self.lanes is None:
            self.rectangles[0].append(keys, values, columns, *how, arrived)
        else:
            lanes, single = self.lanes, complete and columns.shape[-1] == 1
            # A single token of every row came at the same time.
            mine = lanes.split_columns(columns, same=single)
            nothing = (None,) * len(mine)
            came = nothing if arrived is None else lanes.split(arrived)
            each = zip(
                self.rectangles, lanes.split(keys), lanes.split(values), mine, came, strict=True
            )
            for rectangle, new_keys, new_values, new_columns, positions in each:
                rectangle.append(new_keys, new_values, new_columns, *how, positions)
        self.whole, self.seen = self.whole and whole, seen

    def columns_after(self, columns: Tensor, in_free_slot: bool) -> Tensor:
        """The `columns` after `append` will have stored new tokens; see there."""
        if self.lanes is None:
            return self.rectangles[0].columns_after(columns, in_free_slot)
        each = [one.columns_after(mine, in_free_slot) for one, mine in self._apart(columns, False)]
        return self.lanes.join(each, -1)

    def rewrite_keys(
        self, keys: Tensor, index: Tensor | None = None, there: Tensor | None = None
    ) -> None:
        """Puts other keys in the place of those that are held.

        Args:
            keys: `[B, Hkv, S, D]`; of the slots `index` alone if that is given.
            index: `[B, 1, n]` int64, each slot of a row once.
            there: `[B, 1, n]` bool, which of these are meant; None for all.
        """
        if self.lanes is None:
            _plain(self.rectangles[0]).rewrite_keys(keys, self.used, index, there)
            return
        if index is not None:
            whole = self.keys
            place = index[..., None].expand_as(keys)
            if there is not None:
                keys = torch.where(there[..., None], keys, whole.gather(2, place))
            keys = put(whole, index, keys)
        for rectangle, mine in self._apart(keys):
            _plain(rectangle).rewrite_keys(mine, rectangle.used)

    # What goes.

    def keep_all(self) -> None:
        """Drops nothing; no policy is known to be full any more."""
        for rectangle in self.rectangles:
            rectangle.turnover = replace(rectangle.turnover, policy=None)

    def keep(self, kept: Tensor, policy: int | None = None, loses: bool = True) -> None:
        """Drops every slot that is not named.

        Args:
            kept: `[B, 1|Hkv, S]` bool; with a head axis of Hkv the heads part ways.
            policy: the policy that is full now; see `Turnover`.
            loses: whether valid tokens may be among what goes; see `whole`.
        """
        columns = self.columns.masked_fill(~kept, -1)
        self.whole = self.whole and not loses
        if self._record:
            # Nothing leaves its place.
            for rectangle, mine in self._apart(columns):
                rectangle.mask(mine, policy)
            return
        counts = (columns >= 0).sum(-1)
        fewest, most = torch.stack(counts.aminmax()).tolist()
        apart = self.divides and most - fewest > allowed(most)
        if self.lanes is None and not apart:
            self.rectangles[0].keep(columns, fewest, most, policy)
            return
        kept_by = counts.tolist()
        wanted = rearranged(kept_by, self.lanes)
        if wanted is not None:
            self._rearrange(*wanted)
        each = zip(self._apart(columns), cells(kept_by, self.lanes), strict=True)
        for (rectangle, mine), numbers in each:
            rectangle.keep(mine, min(numbers), max(numbers), policy)

    def _rearrange(self, by_head: bool, groups: list[list[int]]) -> None:
        """Lets lanes stand in other rectangles. All slots are in use then, in the same places."""
        whole = self.rectangles[0] if self.lanes is None else united(self.rectangles, self.lanes)
        if len(groups) == 1:
            self.lanes, self.rectangles = None, [whole]
            return
        where = whole.columns.shape[0], self.heads, by_head
        self.lanes = Lanes(*where, groups, whole.columns.device)
        self.rectangles = whole.divided(self.lanes)

    def free(self, gone: Tensor, policy: int | None = None) -> None:
        """Drops one slot in every row and head, for the next token to take.

        Args:
            gone: `[B, 1|Hkv, 1]` int64; with a head axis of Hkv the heads part ways.
            policy: the policy that is full now; see `Turnover`.
        """
        each = [(self.rectangles[0], gone)]
        if self.lanes is not None:
            # Places in a rectangle, whose slots are the last ones of the layer's.
            size, apart = self.used, self._apart(gone, slots=False)
            each = [(rectangle, mine - size + rectangle.used) for rectangle, mine in apart]
        parted = self.lanes is not None and self.lanes.by_head and gone.shape[1] < self.heads
        if parted or self._record or not all(one.can_free(mine) for one, mine in each):
            shape = (*gone.shape[:2], self.used)
            everything = torch.ones(shape, dtype=torch.bool, device=gone.device)
            self.keep(everything.scatter(-1, gone, False), policy)
            return
        for rectangle, mine in each:
            rectangle.free(mine, policy)
        self.whole = False

    def alike(self) -> Hashable:
        """The facts that layers must share to evict together; None where this one is not full."""
        first = self.rectangles[0]
        turnover = first.turnover
        if self.lanes is not None or turnover.policy is None:
            return None
        if turnover.slot is not None or self._record:
            return None
        return (turnover.policy, first.columns.shape, self.heads, self.parts, first.columns.device)

    # Drafts.

    def record(self) -> None:
        """Notes what is held now, to come back to; until `settle`, nothing leaves its place."""
        self._record.append(_Record([each.past() for each in self.rectangles], dict(self.records)))

    def settle(self, back: int) -> None:
        """Returns to the last record but `back`, if there are any, and frees all the rest."""
        if not self._record:
            return
        record, self._record = self._record[-1 - back], []
        # Not what nobody wants any more.
        self.records = {p: r for p, r in record.records.items() if p in self.records}
        if record.rectangles[0].columns is None:
            self.reset()
            return
        for rectangle, past in zip(self.rectangles, record.rectangles, strict=True):
            rectangle.come_back(past)
        self.keep(self.columns >= 0, loses=False)

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was (int64 `[B']`): beams, repeats, selections."""
        if not self.is_initialized:
            return
        rows = rows.to(self.device)
        if self.lanes is None:
            self.rectangles[0].select_rows(rows)
        else:
            self.lanes, places = self.lanes.selected(rows.tolist())
            before, self.rectangles = zip(self.rectangles, places, strict=True), []
            for rectangle, mine in before:
                if mine:
                    rectangle.select_rows(torch.tensor(mine, device=rows.device))
                    self.rectangles.append(rectangle)
            if len(self.rectangles) == 1:
                self.rectangles = [united(self.rectangles, self.lanes)]
                self.lanes = None
        self.records = {
            part: tuple(tensor.index_select(0, rows) for tensor in record)
            for part, record in self.records.items()
        }

    def _apart(self, tensor: Tensor, slots: bool = True) -> list[tuple[Rectangle, Tensor]]:
        """Each rectangle with its part of a tensor.

        Args:
            tensor: `[B, 1|Hkv, S, ...]`.
            slots: whether S are the slots in use; else each rectangle has all of that axis.
        """
        if self.lanes is None:
            return [(self.rectangles[0], tensor)]
        each = zip(self.rectangles, self.lanes.split(tensor), strict=True)
        if not slots:
            return list(each)
        return [(one, mine[:, :, mine.shape[2] - one.used :]) for one, mine in each]


def _plain(rectangle: Rectangle) -> Plain:
    """What holds keys that may be rewritten: what is held in codes is never coded again."""
    assert isinstance(rectangle.held, Plain)
    return rectangle.held


def _turned(rectangle: Rectangle) -> tuple[Tensor, Tensor]:
    """Keys and values as their store turned them."""
    held = rectangle.held
    if isinstance(held, QuantizedSlots):
        return held.turned(rectangle.used)
    return rectangle.keys, rectangle.values


def _piece(rectangle: Rectangle, codes: bool) -> Piece:
    """What attention needs of a rectangle; see `SlotLayer.pieces`."""
    held = rectangle.held
    assert rectangle.held_columns is not None
    about = rectangle.held_columns, rectangle.complete
    if codes and isinstance(held, QuantizedSlots):
        coded = held.coded(rectangle.used)
        keys, values = (each.shape_alone(held.dtype) for each in coded)
        return Piece(keys, values, *about, coded)
    return Piece(*_turned(rectangle), *about)


def _join_tokens(past: Past, part: Statistic, numbers: Tensor, columns: Tensor) -> None:
    """Joins numbers of tokens to what was recorded; see `SlotLayer.observe_tokens`."""
    if past.columns is not None and part in past.statistics:
        new = numbers_at(past.columns, numbers, columns)
        past.statistics[part] = part.join(past.statistics[part], new)


def _numbered(each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several rectangles, each name behind the rectangle's number."""
    return {f"{i}.{name}": tensor for i, one in enumerate(each) for name, tensor in one.items()}
