"""One layer's slots: one rectangle, or several where heads or rows keep different numbers."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.coded import Coded
from ..attention.inputs import Pieces
from ..attention.lanes import Lanes
from ..errors import KVPruneError
from ..models.devices import without_autocast
from ..models.structure import Local
from ..statistics import Statistic
from .buffers import numbers_at
from .joining import described
from .plain import Plain
from .quantized import QuantizedSlots
from .rectangle import Past, Rectangle, Store
from .several import Form, Rectangles, kept
from .waiting import MOST, Told, may_wait, together


@dataclass(frozen=True)
class _Record:
    """What a layer held, to come back to: by rectangle, and the statistics per layer."""

    past: list[Past]
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
        local, arrivals, store, direct, divides: see above.
        form: the slots: a rectangle, or several.
        seen: the cache's logical length, as far as the layer knows it.
        whole: it is known that the layer still holds every token that was read, but for padding.
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
        self.arrivals, self.divides = arrivals, divides
        self.reset()

    def reset(self) -> None:
        """Forgets everything and frees the buffers."""
        self.seen = 0
        self.whole = True
        self.form: Form = Rectangle(self.store, self.parts, self.arrivals)
        self._records: dict[Statistic, tuple[Tensor, ...]] = {}
        self._waiting: list[Told] = []
        self._record: list[_Record] = []

    # What transformers reads.

    @property
    def is_initialized(self) -> bool:
        """Whether anything was stored yet."""
        return self.form.held is not None

    @property
    def device(self) -> torch.device:
        """The device of the layer."""
        # As layers of transformers have it: no such attribute before the first tokens.
        held = self.form.rectangles[0].held_columns
        if held is None:
            raise AttributeError("device")
        return held.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        held = self.form.rectangles[0].held
        if held is None:
            raise AttributeError("dtype")
        return held.dtype

    @property
    def keys(self) -> Tensor:
        """`[B, Hkv, S, D]`; None before the first tokens, as in transformers."""
        return self.form.keys if self.is_initialized else None  # type: ignore[return-value]

    @property
    def values(self) -> Tensor:
        """`[B, Hkv, S, Dv]`; None before the first tokens, as in transformers."""
        return self.form.values if self.is_initialized else None  # type: ignore[return-value]

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
        self.form.move("cpu")

    def prefetch(self) -> None:
        """Brings keys and values back to where the layer is."""
        if self.is_initialized:
            self.form.move(self.device)

    # What there is.

    @property
    def rectangles(self) -> list[Rectangle]:
        """One, or several."""
        return self.form.rectangles

    @property
    def lanes(self) -> Lanes | None:
        """Which rows and heads stand in which rectangle; None for one."""
        return self.form.lanes

    @property
    def made_anew(self) -> bool:
        """Whether `keys` and `values` are made when they are read."""
        return self.lanes is not None or self.holds_codes

    @property
    def heads(self) -> int:
        """The key/value heads that are stored, Hkv."""
        return self.form.heads

    @property
    def used(self) -> int:
        """Slots in use, S."""
        return self.form.used

    @property
    def in_use(self) -> int:
        """Slots of a row and head before the next token is stored, a mean over these, rounded.

        A free slot does not count: the next token takes it.
        """
        return self.form.in_use

    @property
    def complete(self) -> bool:
        """Whether it is known that no slot in use is empty."""
        return self.form.complete

    @property
    def full_for(self) -> int | None:
        """The policy that is full; see `Turnover.policy`."""
        policy: int | None = self.form.turnover.policy
        return policy

    @property
    def columns(self) -> Tensor:
        """`[B, 1|Hkv, S]` int64, -1 for an empty slot."""
        return self.form.columns

    @property
    def held_columns(self) -> Tensor:
        """`[B, 1|Hkv, n]` int64: `columns`, and behind them any room for more."""
        held = self.form.held_columns
        assert held is not None
        return held

    @property
    def statistics(self) -> dict[Statistic, Tensor]:
        """Those per slot, each `[B, Hkv, S]`."""
        return self.form.statistics

    @property
    def arrived(self) -> Tensor:
        """The positions that the slots' keys came with, `[B, 1|Hkv, S]` int32, as `columns`."""
        return self.form.arrived

    @property
    def records(self) -> dict[Statistic, tuple[Tensor, ...]]:
        """What is held of statistics per layer, but for those of which nothing is held."""
        self.join_waiting()
        return self._records

    def turned(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the store turned them."""
        return self.form.turned()

    @property
    def holds_codes(self) -> bool:
        """Whether `coded` gives something."""
        return isinstance(self.form, Rectangle) and isinstance(self.form.held, QuantizedSlots)

    def coded(self) -> tuple[Coded, Coded] | None:
        """Keys and values as codes; None where these are of several rectangles."""
        return self.form.coded()

    def pieces(self, codes: bool) -> Pieces | None:
        """What attention needs of each of several rectangles; None where there is one.

        Args:
            codes: whether what is held as codes is handed on as codes.
        """
        return self.form.pieces(codes) if isinstance(self.form, Rectangles) else None

    def tensors(self) -> Iterator[Tensor]:
        """All that is held, for counting bytes."""
        yield from self.form.tensors()
        for record in self._records.values():
            yield from record
        for told in self._waiting:
            yield from told.tensors()
        for before in self._record:
            for past in before.past:
                yield from () if past.columns is None else (past.columns,)
                yield from past.statistics.values()
            for record in before.records.values():
                yield from record

    # As a file.

    def numbers(self) -> dict[str, Any]:
        """With `named_tensors`, all that brings the layer back as it is (see `restore`)."""
        return {**self.form.numbers(), "whole": self.whole}

    def named_tensors(self) -> dict[str, Tensor]:
        """The slots in use, and free ones; `columns` is one object where layers share it."""
        held = self.form.named_tensors()
        for part, record in self.records.items():
            held |= {f"records.{part!r}.{i}": tensor for i, tensor in enumerate(record)}
        return held

    def restore(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Becomes the layer whose `numbers` and `named_tensors` these are.

        Statistics that nobody wants here are left out.
        """
        self.whole = numbers["whole"]
        (alone,) = self.rectangles
        if "rectangles" in numbers:
            self.form = Rectangles.restored(alone, numbers, tensors)
        else:
            alone.restore(numbers, tensors)
        for part in self.layer_parts:
            start = f"records.{part!r}."
            count = sum(name.startswith(start) for name in tensors)
            if count:
                self._records[part] = tuple(tensors[f"{start}{i}"] for i in range(count))

    # What statistics know.

    def narrow_statistics(self, statistics: tuple[Statistic, ...]) -> None:
        """Forgets all statistics but these."""
        self.parts = tuple(part for part in self.parts if part in statistics)
        self.layer_parts = tuple(part for part in self.layer_parts if part in statistics)
        self.form.narrow_statistics(self.parts)
        self._records = {n: value for n, value in self.records.items() if n in statistics}

    def observe(self, part: Statistic, new: Any, several: bool = False) -> None:
        """Joins what a forward gave to a statistic per slot.

        Args:
            part: the statistic.
            new: what `Statistic.join` is handed, detached.
            several: whether the forward has several tokens.

        Raises:
            KVPruneError: a statistic that is to be checked has another shape then, or NaN.
        """
        self.form.observe(part, new, several)

    def observe_tokens(self, part: Statistic, numbers: Tensor, columns: Tensor) -> None:
        """Joins numbers of tokens to a statistic per slot, also to what is recorded.

        Args:
            part: the statistic.
            numbers: `[B, 1|Hkv, n]`.
            columns: `[B, n]` int64, of the tokens, -1 for none.
        """
        self.observe(part, numbers_at(self.columns, numbers, columns))
        for record in self._record:
            self.form.observe_past(record.past, part, numbers, columns)

    def observe_queries(self, told: Told) -> None:
        """Joins queries to statistics per layer, now or with later ones; see `Statistic.join`.

        Raises:
            KVPruneError: a statistic is no tuple of tensors with an axis for the rows.
        """
        if self._waiting and not self._waiting[-1].goes_with(told):
            self.join_waiting()
        waits = may_wait(told)
        self._waiting.append(told.copied() if waits else told)
        if len(self._waiting) == MOST or not waits:
            self.join_waiting()

    def join_waiting(self) -> None:
        """Joins the queries that wait, as reading `records` does, too.

        Raises:
            KVPruneError: see `observe_queries`.
        """
        if not self._waiting:
            return
        told = together(self._waiting)
        rows, joined = told.columns.shape[0], {}
        for part in told.parts:
            with without_autocast(told.queries.device):
                value = part.join(self._records.get(part, ()), told.read_by(part))
            tensors = isinstance(value, tuple) and all(isinstance(t, Tensor) for t in value)
            if not tensors or any(t.dim() == 0 or t.shape[0] != rows for t in value):
                raise KVPruneError(
                    f"{part!r}: expected join() to return a tuple of tensors whose first axis are "
                    f"the {rows} rows, got {described(value)}"
                )
            joined[part] = value
        # All or nothing: after an error they wait on, and the next who reads gets it as well.
        self._records.update(joined)
        self._waiting = []

    def forget_records(self, kept: Container[Statistic] = ()) -> None:
        """Frees the statistics per layer but for those that are named; they begin anew."""
        if any(part not in kept for part in self.layer_parts):
            self._records = {part: held for part, held in self.records.items() if part in kept}

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
        in_free_slot = in_free_slot and not self._record
        self.form.append(keys, values, columns, complete, in_free_slot, arrived)
        self.whole, self.seen = self.whole and whole, seen

    def columns_after(self, columns: Tensor, in_free_slot: bool) -> Tensor:
        """The `columns` after `append` will have stored new tokens; see there."""
        return self.form.columns_after(columns, in_free_slot)

    def rewrite_keys(
        self, keys: Tensor, index: Tensor | None = None, there: Tensor | None = None
    ) -> None:
        """Puts other keys in the place of those that are held.

        Args:
            keys: `[B, Hkv, S, D]`; of the slots `index` alone if that is given.
            index: `[B, 1, n]` int64, each slot of a row once.
            there: `[B, 1, n]` bool, which of these are meant; None for all.
        """
        self.form.rewrite_keys(keys, index, there)

    # What goes.

    def keep_all(self) -> None:
        """Drops nothing; no policy is known to be full any more."""
        self.form.keep_all()

    def keep(self, kept_slots: Tensor, policy: int | None = None, loses: bool = True) -> None:
        """Drops every slot that is not named.

        Args:
            kept_slots: `[B, 1|Hkv, S]` bool; with a head axis of Hkv each head may keep others.
            policy: the policy that is full now; see `Turnover`.
            loses: whether valid tokens may be among what goes; see `whole`.
        """
        columns = self.columns.masked_fill(~kept_slots, -1)
        self.whole = self.whole and not loses
        if self._record:
            self.form.mask(columns, policy)
        else:
            self.form = kept(self.form, columns, policy, self.divides)

    def free(self, gone: Tensor, policy: int | None = None) -> None:
        """Drops one slot in every row and head, for the next token to take.

        Args:
            gone: `[B, 1|Hkv, 1]` int64; with a head axis of Hkv each head has its own.
            policy: the policy that is full now; see `Turnover`.
        """
        if self._record or not self.form.can_free(gone):
            shape = (*gone.shape[:2], self.used)
            everything = torch.ones(shape, dtype=torch.bool, device=gone.device)
            self.keep(everything.scatter(-1, gone, False), policy)
            return
        self.form.free(gone, policy)
        self.whole = False

    def drop_newest(self, count: int) -> None:
        """Drops the last `count` slots, those of the tokens that were stored last."""
        self.form.drop_newest(count)
        self.seen -= count

    def alike(self) -> Hashable:
        """The facts that layers must share to evict together; None where this one is not full."""
        form = self.form
        if isinstance(form, Rectangles) or self._record:
            return None
        turnover = form.turnover
        if turnover.policy is None or turnover.slot is not None:
            return None
        return (turnover.policy, form.columns.shape, form.heads, self.parts, form.columns.device)

    # Drafts, and rows.

    def record(self) -> None:
        """Notes what is held now, so that `settle` can go back to it.

        Until then slots are emptied, but none leaves its place.
        """
        self._record.append(_Record(self.form.past(), dict(self.records)))

    def settle(self, back: int) -> None:
        """Goes back to what was recorded `back` records before the last; frees all records.

        Does nothing where nothing was recorded.
        """
        if not self._record:
            return
        record, self._record = self._record[-1 - back], []
        # Not what nobody wants any more.
        self._records = {p: r for p, r in record.records.items() if p in self.records}
        if record.past[0].columns is None:
            self.reset()
            return
        self.form.come_back(record.past)
        self.keep(self.columns >= 0, loses=False)

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was (int64 `[B']`): beams, repeats, selections."""
        if not self.is_initialized:
            return
        rows = rows.to(self.device)
        self.form = self.form.select_rows(rows)
        self._records = {
            part: tuple(tensor.index_select(0, rows) for tensor in record)
            for part, record in self.records.items()
        }
