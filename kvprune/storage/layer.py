"""One layer's slots: K, V, columns and numbers per slot, which one gather moves together."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import KVPruneError
from ..models.structure import Local
from ..statistics import Block, Statistic, statistic_dtype
from .buffers import SLACK, extended, gathered, numbers_at, put, roomier, watched, widened
from .plain import Plain
from .quantized import Quantized, QuantizedSlots
from .turnover import Stage, Turnover

Store = type[Plain] | Quantized
"""Makes what holds keys and values."""

_ARRIVED = "arrived"


@dataclass(frozen=True)
class _Past:
    """What a layer held, to come back to: columns, and both kinds of statistics."""

    columns: Tensor | None
    statistics: dict[Statistic, Tensor]
    records: dict[Statistic, tuple[Tensor, ...]]


class SlotLayer:
    """Slots of one layer, for all rows of a batch: columns, numbers, and held keys and values.

    There is room for `capacity` slots, of which the first `used` are in use: `[B, 1|Hkv, capacity]`
    for columns, `[B, Hkv, capacity]` for each statistic and, with `arrivals`, for the position that
    a slot's key came with (int32). `held` has the keys and values. A slot whose column is -1 is
    empty. Slots come in no order.

    Args:
        statistics: what is observed here, per slot or per layer.
        local: what the layer's queries can see; None for everything.
        arrivals: whether slots keep the position that their key came with.
        store: makes what holds keys and values.
        direct: whether attention is handed keys and values as `update` returns them.

    Attributes:
        parts: the statistics per slot.
        layer_parts: the statistics per layer.
        records: what is held of the latter; those of which nothing is held are left out.
        local: see above.
        store, direct: see above.
        held: keys and values; None before the first tokens.
        used: slots in use.
        seen: the cache's logical length, as far as the layer knows it.
        gaps: whether slots in use may be empty, the free slot left out.
        whole: it is known that the layer lacks no valid token that was read.
        turnover: where the next token goes, and who is full.
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
    ) -> None:
        self.store, self.direct = store, direct
        self.parts = tuple(s for s in statistics if s.per == "slot")
        self.layer_parts = tuple(s for s in statistics if s.per == "layer")
        self.local = local
        self._arrivals = arrivals
        self.reset()

    def reset(self) -> None:
        """Forgets everything and frees the buffers."""
        self.used = self.seen = 0
        self.gaps = False
        self.whole = True
        self.turnover = Turnover()
        self.held: Plain | QuantizedSlots | None = None
        self._columns: Tensor | None = None
        # Numbers per slot: statistics, and with `arrivals` positions.
        self._numbers: dict[Statistic | str, Tensor] = {}
        self.records: dict[Statistic, tuple[Tensor, ...]] = {}
        self._record: list[_Past] = []

    @property
    def is_initialized(self) -> bool:
        """Whether anything was stored yet."""
        return self.held is not None

    @property
    def device(self) -> torch.device:
        """The device of the layer."""
        # As layers of transformers have it: no such attribute before the first tokens.
        if self._columns is None:
            raise AttributeError("device")
        return self._columns.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        if self.held is None:
            raise AttributeError("dtype")
        return self.held.dtype

    @property
    def heads(self) -> int:
        """The key/value heads that are stored, Hkv."""
        assert self.held is not None
        return self.held.heads

    @property
    def keys(self) -> Tensor:
        """`[B, Hkv, S, D]`; None before the first tokens, as in transformers."""
        return None if self.held is None else self.held.keys(self.used)  # type: ignore[return-value]

    def turned(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the store turned them."""
        assert isinstance(self.held, QuantizedSlots)
        return self.held.turned(self.used)

    @property
    def values(self) -> Tensor:
        """`[B, Hkv, S, Dv]`; None before the first tokens, as in transformers."""
        return None if self.held is None else self.held.values(self.used)  # type: ignore[return-value]

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
        if self.held is not None:
            self.held.move("cpu")

    def prefetch(self) -> None:
        """Brings keys and values back to where the layer is."""
        if self.held is not None:
            self.held.move(self.device)

    @property
    def columns(self) -> Tensor:
        """`[B, 1|Hkv, S]` int64, -1 for an empty slot."""
        assert self._columns is not None
        return self._columns if self.used == self.capacity else self._columns[..., : self.used]

    @property
    def held_columns(self) -> Tensor:
        """`[B, 1|Hkv, capacity]` int64: `columns`, and behind them room for more."""
        assert self._columns is not None
        return self._columns

    @property
    def statistics(self) -> dict[Statistic, Tensor]:
        """Those per slot, each `[B, Hkv, S]`, views."""
        held = self._numbers
        return {part: held[part][..., : self.used] for part in self.parts if part in held}

    @property
    def arrived(self) -> Tensor:
        """The positions that the slots' keys came with, `[B, 1|Hkv, S]` int32, as `columns`."""
        return self._numbers[_ARRIVED][:, : self.columns.shape[1], : self.used]

    @property
    def capacity(self) -> int:
        """Slots that there is room for."""
        return 0 if self._columns is None else self._columns.shape[-1]

    @property
    def complete(self) -> bool:
        """Whether it is known that no slot in use is empty."""
        return not self.gaps and self.turnover.slot is None

    def tensors(self) -> Iterator[Tensor]:
        """All that is held, for counting bytes."""
        yield from () if self.held is None else self.held.tensors()
        yield from (t for t in (self._columns, self.turnover.slot) if t is not None)
        yield from self._numbers.values()
        for record in self.records.values():
            yield from record
        for past in self._record:
            yield from () if past.columns is None else (past.columns,)
            yield from past.statistics.values()
            for record in past.records.values():
                yield from record

    def numbers(self) -> dict[str, Any]:
        """With `named_tensors`, all that brings the layer back as it is (see `restore`)."""
        numbers = {"used": self.used, "capacity": self.capacity}
        held = {} if self.held is None else self.held.numbers()
        return {**numbers, "gaps": self.gaps, "whole": self.whole, **held}

    def named_tensors(self) -> dict[str, Tensor]:
        """The slots in use, and the free slot; `columns` is one object where layers share it."""
        assert self.held is not None
        held = {**self.held.named_tensors(self.used), "columns": self.columns}
        held |= {f"statistics.{part!r}": value for part, value in self.statistics.items()}
        for part, record in self.records.items():
            held |= {f"records.{part!r}.{i}": tensor for i, tensor in enumerate(record)}
        if self._arrivals:
            held["arrived"] = self._numbers[_ARRIVED][..., : self.used]
        slot = self.turnover.slot
        return held if slot is None else {**held, "hole": slot}

    def restore(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Becomes the layer whose `numbers` and `named_tensors` these are.

        The room for more slots comes back too, since it decides when slots are moved, and their
        order decides how sums round. Statistics that nobody wants here are left out.
        """
        self.used, self.gaps, self.whole = numbers["used"], numbers["gaps"], numbers["whole"]
        self.turnover = Turnover().freed(tensors.get("hole"), None)
        room = numbers["capacity"] - self.used
        self._columns = roomier(tensors["columns"], room, -1)
        self.held = self.store.restored(numbers, tensors, room)
        stored: dict[Statistic | str, Tensor] = {
            part: tensors[f"statistics.{part!r}"] for part in self.parts
        }
        if self._arrivals:
            stored[_ARRIVED] = tensors["arrived"]
        self._numbers = {name: roomier(value, room, 0) for name, value in stored.items()}
        for part in self.layer_parts:
            start = f"records.{part!r}."
            count = sum(name.startswith(start) for name in tensors)
            if count:
                self.records[part] = tuple(tensors[f"{start}{i}"] for i in range(count))

    def narrow_statistics(self, statistics: tuple[Statistic, ...]) -> None:
        """Forgets all statistics but these."""
        self.parts = tuple(part for part in self.parts if part in statistics)
        self.layer_parts = tuple(part for part in self.layer_parts if part in statistics)
        kept = {*statistics, _ARRIVED}
        self._numbers = {n: value for n, value in self._numbers.items() if n in kept}
        self.records = {n: value for n, value in self.records.items() if n in kept}

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
        free_slot = self.turnover.slot
        if in_free_slot and free_slot is not None and not self._record:
            self._fill(free_slot, keys, values, columns, arrived)
            self.gaps = self.gaps or not complete
        else:
            self.gaps = self.gaps or free_slot is not None or not complete
            self._extend(keys, values, columns, arrived)
        self.turnover = self.turnover.stored(single=complete and columns.shape[-1] == 1)
        self.whole, self.seen = self.whole and whole, seen

    def columns_after(self, columns: Tensor, in_free_slot: bool) -> Tensor:
        """The `columns` after `append` will have stored new tokens; see there."""
        if self._columns is None:
            return columns
        slot = self.turnover.slot
        if in_free_slot and slot is not None:
            return self.columns.scatter(-1, slot, columns.expand_as(slot))
        return torch.cat([self.columns, columns.expand(-1, self.columns.shape[1], -1)], -1)

    def _fill(
        self,
        free_slot: Tensor,
        keys: Tensor,
        values: Tensor,
        columns: Tensor,
        arrived: Tensor | None,
    ) -> None:
        assert self.held is not None
        self.held.put(free_slot, keys, values)
        if self._arrivals:
            assert arrived is not None
            where = free_slot.expand(-1, keys.shape[1], -1)
            self._numbers[_ARRIVED] = put(
                self._numbers[_ARRIVED], where, arrived.int().expand_as(where)
            )
        if self.turnover.stage is Stage.TAKEN:
            return
        self._columns = put(self._columns, free_slot, columns.expand_as(free_slot))
        for part in self.parts:
            where = free_slot.expand(-1, keys.shape[1], -1)
            self._numbers[part] = put(self._numbers[part], where, part.start)

    def _extend(
        self, keys: Tensor, values: Tensor, columns: Tensor, arrived: Tensor | None
    ) -> None:
        start, self.used = self.used, self.used + columns.shape[-1]
        if self._columns is None:
            # Not copied where it need not be: layers that hold the same columns share the
            # tensor, by which masks are memoised.
            self._columns = columns
        else:
            columns = columns.expand(-1, self._columns.shape[1], -1)
            self._columns = extended(self._columns, columns, start)
        if self.held is None:
            self.held = self.store.of(keys, values)
        else:
            self.held.append(keys, values, start)
        for name, value in self._new_numbers(keys, arrived).items():
            self._numbers[name] = extended(self._numbers.get(name), value, start)

    def _new_numbers(self, keys: Tensor, arrived: Tensor | None) -> dict[Statistic | str, Tensor]:
        """New tokens' numbers, each `[B, Hkv, Q]`."""
        dtype = statistic_dtype(keys.dtype)
        numbers: dict[Statistic | str, Tensor] = {
            part: torch.full_like(keys[..., 0], part.start, dtype=dtype) for part in self.parts
        }
        if self._arrivals:
            assert arrived is not None
            numbers[_ARRIVED] = arrived.int().expand(keys.shape[:3])
        return numbers

    def observe(self, part: Statistic, new: Any, several: bool = False) -> None:
        """Joins what a forward gave to a statistic per slot.

        Args:
            part: the statistic.
            new: what `Statistic.join` is handed, detached.
            several: whether the forward has several tokens.

        Raises:
            KVPruneError: a statistic that is to be checked has another shape then, or NaN.
        """
        held = self._numbers[part]
        if part.adds and not watched(held):
            held[..., : self.used].add_(new)
            return
        before = held[..., : self.used]
        value = part.join(before, new)
        _check_joined(part, before, value)
        if several and part.checked:
            _check_comparable(part, value, new)
        if watched(held):
            self._numbers[part] = torch.cat([value, held[..., self.used :]], -1)
        else:
            # In its place, since layers that decode together share it.
            before.copy_(value)

    def observe_tokens(self, part: Statistic, numbers: Tensor, columns: Tensor) -> None:
        """Joins numbers of tokens to a statistic per slot, also to what is recorded.

        Args:
            part: the statistic.
            numbers: `[B, 1|Hkv, n]`.
            columns: `[B, n]` int64, of the tokens, -1 for none.
        """
        self.observe(part, numbers_at(self.columns, numbers, columns))
        for past in self._record:
            if past.columns is not None and part in past.statistics:
                new = numbers_at(past.columns, numbers, columns)
                past.statistics[part] = part.join(past.statistics[part], new)

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
                f"{rows} rows, got {_described(value)}"
            )
        self.records[part] = value

    def forget_records(self, kept: Container[Statistic] = ()) -> None:
        """Frees the statistics per layer but for those that are named; they begin anew."""
        self.records = {part: held for part, held in self.records.items() if part in kept}

    def rewrite_keys(
        self, keys: Tensor, index: Tensor | None = None, there: Tensor | None = None
    ) -> None:
        """Puts other keys in the place of those that are held.

        Args:
            keys: `[B, Hkv, S, D]`; of the slots `index` alone if that is given.
            index: `[B, 1, n]` int64, each slot of a row once.
            there: `[B, 1, n]` bool, which of these are meant; None for all.
        """
        # Others are read-only: what is held in codes is never coded again.
        assert isinstance(self.held, Plain)
        self.held.rewrite_keys(keys, self.used, index, there)

    def keep_all(self) -> None:
        """Drops nothing; no policy is known to be full any more."""
        self.turnover = replace(self.turnover, policy=None)

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
            self._columns, self.gaps = widened(columns, self.capacity, -1), True
            self.turnover = self.turnover.freed(self.turnover.slot, policy)
            return
        fewest, most = torch.stack((columns >= 0).sum(-1).aminmax()).tolist()
        if self.used - most > 1 or self.capacity - most > SLACK:
            self._compact(columns, most)
            self.gaps, self.turnover = fewest < most, Turnover(policy=policy)
            return
        self._columns = widened(columns, self.capacity, -1)
        slot = columns.argmin(-1, keepdim=True) if most < self.used else None
        self.turnover = self.turnover.freed(slot, policy)
        # As it will be once the free slot is filled.
        self.gaps = fewest < (self.used if slot is None else self.used - 1)

    def free(self, gone: Tensor, policy: int | None = None) -> None:
        """Drops one slot in every row and head, for the next token to take.

        Args:
            gone: `[B, 1|Hkv, 1]` int64; with a head axis of Hkv the heads part ways.
            policy: the policy that is full now; see `Turnover`.
        """
        assert self._columns is not None
        fits = self.turnover.slot is None and self.capacity - self.used < SLACK and not self._record
        if not fits or gone.shape[1] != self.columns.shape[1]:
            shape = (*gone.shape[:2], self.used)
            everything = torch.ones(shape, dtype=torch.bool, device=gone.device)
            self.keep(everything.scatter(-1, gone, False), policy)
            return
        # Not in place: layers may share the tensor until one of them drops something.
        self._columns = self._columns.scatter(-1, gone, -1)
        self.turnover, self.whole = self.turnover.freed(gone, policy), False

    def alike(self) -> Hashable:
        """The facts that layers must share to evict together; None where this one is not full."""
        turnover = self.turnover
        if turnover.policy is None or turnover.slot is not None or self._record:
            return None
        return (
            turnover.policy,
            self.columns.shape,
            self.heads,
            self.parts,
            self.columns.device,
        )

    def borrow(self, columns: Tensor, statistics: dict[Statistic, Tensor]) -> None:
        """Takes these in the place of its own, which are equal."""
        self._columns = columns
        for part, value in statistics.items():
            self._numbers[part] = value

    def borrows(self, columns: Tensor, statistics: dict[Statistic, Tensor]) -> bool:
        """Whether these very tensors are its columns and statistics."""
        same = (self._numbers.get(name) is value for name, value in statistics.items())
        return self._columns is columns and all(same)

    def record(self) -> None:
        """Notes what is held now, to come back to; until `settle`, nothing leaves its place."""
        columns = None if self._columns is None else self.columns
        statistics = {part: value.clone() for part, value in self.statistics.items()}
        self._record.append(_Past(columns, statistics, dict(self.records)))

    def settle(self, back: int) -> None:
        """Returns to the last record but `back`, if there are any, and frees all the rest."""
        if not self._record:
            return
        past = self._record[-1 - back]
        # Not what nobody wants any more.
        self.records = {p: r for p, r in past.records.items() if p in self.records}
        self._record, columns = [], past.columns
        if columns is None:
            self.reset()
            return
        self.used, capacity = columns.shape[-1], self.capacity
        self._columns = widened(columns, capacity, -1)
        for name, value in past.statistics.items():
            self._numbers[name] = widened(value, capacity, 0)
        self.keep(columns >= 0, loses=False)

    def _compact(self, columns: Tensor, size: int) -> None:
        """Moves the `size` slots that stay to the front of new buffers, with one to spare."""
        assert self.held is not None
        order = (columns < 0).byte().argsort(dim=-1, stable=True)[..., :size]
        self._columns = widened(columns.gather(-1, order), size + 1, -1)
        self.held.gather(order)
        for name, value in self._numbers.items():
            self._numbers[name] = gathered(value, order, 1)
        self.used = size

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was (int64 `[B']`): beams, repeats, selections."""
        if self.held is None or self._columns is None:
            return
        rows = rows.to(self.device)
        self.held.select_rows(rows)
        self._columns = self._columns.index_select(0, rows)
        self.turnover = self.turnover.select_rows(rows)
        for name, value in self._numbers.items():
            self._numbers[name] = value.index_select(0, rows)
        self.records = {
            part: tuple(tensor.index_select(0, rows) for tensor in record)
            for part, record in self.records.items()
        }


def _check_joined(part: Statistic, before: Tensor, value: Any) -> None:
    fits = isinstance(value, Tensor) and value.shape == before.shape
    if not fits or value.dtype != before.dtype or value.device != before.device:
        raise KVPruneError(
            f"{part!r}: expected join() to return {before.dtype} of shape {list(before.shape)} on "
            f"{before.device}, as it was handed, got {_described(value)}"
        )


def _check_comparable(part: Statistic, value: Tensor, new: Tensor | Block) -> None:
    """Refuses NaN in what a statistic returned, unless it was handed NaN."""
    given = new if isinstance(new, Tensor) else new.probabilities
    rows = value.isnan().flatten(1).any(-1) & ~given.isnan().flatten(1).any(-1)
    if bool(rows.any()):
        raise KVPruneError(
            f"{part!r}: expected join() to return numbers that can be compared, got NaN in rows "
            f"{rows.nonzero().flatten().tolist()}"
        )


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)} on {value.device}"
    return type(value).__name__
