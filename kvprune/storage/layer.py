"""One layer's slots: K, V, columns and numbers per slot, which one gather moves together."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models.structure import Local
from ..statistics import statistic_dtype
from .buffers import SLACK, extended, gathered, put, roomier, watched, widened
from .plain import Plain
from .turnover import Stage, Turnover

_ARRIVED = "arrived"


class SlotLayer:
    """Slots of one layer, for all rows of a batch: columns, numbers, and held keys and values.

    There is room for `capacity` slots, of which the first `used` are in use: `[B, 1|Hkv, capacity]`
    for columns, `[B, Hkv, capacity]` for each statistic and, with `arrivals`, for the position that
    a slot's key came with (int32). `held` has the keys and values. A slot whose column is -1 is
    empty. Slots come in no order.

    Args:
        statistics: names of what is observed of the slots.
        local: what the layer's queries can see; None for everything.
        arrivals: whether slots keep the position that their key came with.

    Attributes:
        names: the statistics' names.
        local: see above.
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
        statistics: tuple[str, ...] = (),
        local: Local | None = None,
        arrivals: bool = False,
    ) -> None:
        self.names = statistics
        self.local = local
        self._arrivals = arrivals
        self.reset()

    def reset(self) -> None:
        """Forgets everything and frees the buffers."""
        self.used = self.seen = 0
        self.gaps = False
        self.whole = True
        self.turnover = Turnover()
        self.held: Plain | None = None
        self._columns: Tensor | None = None
        # Numbers per slot: statistics, and with `arrivals` positions.
        self._numbers: dict[str, Tensor] = {}
        self._record: list[tuple[Tensor | None, dict[str, Tensor]]] = []

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
    def keys(self) -> Tensor:
        """`[B, Hkv, S, D]`; None before the first tokens, as in transformers."""
        return None if self.held is None else self.held.keys(self.used)  # type: ignore[return-value]

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
    def statistics(self) -> dict[str, Tensor]:
        """Each `[B, Hkv, S]`, views."""
        held = self._numbers
        return {name: held[name][..., : self.used] for name in self.names if name in held}

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
        for columns, statistics in self._record:
            yield from () if columns is None else (columns,)
            yield from statistics.values()

    def numbers(self) -> dict[str, Any]:
        """With `named_tensors`, all that brings the layer back as it is (see `restore`)."""
        numbers = {"used": self.used, "capacity": self.capacity}
        return {**numbers, "gaps": self.gaps, "whole": self.whole}

    def named_tensors(self) -> dict[str, Tensor]:
        """The slots in use, and the free slot; `columns` is one object where layers share it."""
        held = {"keys": self.keys, "values": self.values, "columns": self.columns}
        held |= {f"statistics.{name}": value for name, value in self.statistics.items()}
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
        self.held = Plain(tensors["keys"], tensors["values"], room)
        stored = {name: tensors[f"statistics.{name}"] for name in self.names}
        if self._arrivals:
            stored[_ARRIVED] = tensors["arrived"]
        self._numbers = {name: roomier(value, room, 0) for name, value in stored.items()}

    def narrow_statistics(self, names: tuple[str, ...]) -> None:
        """Forgets all statistics but these."""
        self.names = names
        kept = {*names, _ARRIVED}
        self._numbers = {n: value for n, value in self._numbers.items() if n in kept}

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
    ) -> tuple[Tensor, Tensor]:
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

        Returns:
            keys and values of all slots in use; where the new ones have another dtype, of the wider
            of the two, as in `DynamicCache`.
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
        return self.keys, self.values

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
        for name in self.names:
            where = free_slot.expand(-1, keys.shape[1], -1)
            self._numbers[name] = put(self._numbers[name], where, 0)

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
            self.held = Plain.of(keys, values)
        else:
            self.held.append(keys, values, start)
        for name, value in self._new_numbers(keys, arrived).items():
            self._numbers[name] = extended(self._numbers.get(name), value, start)

    def _new_numbers(self, keys: Tensor, arrived: Tensor | None) -> dict[str, Tensor]:
        """New tokens' numbers, each `[B, Hkv, Q]`."""
        numbers: dict[str, Tensor] = {}
        if self.names:
            zeros = torch.zeros_like(keys[..., 0], dtype=statistic_dtype(keys))
            numbers |= dict.fromkeys(self.names, zeros)
        if self._arrivals:
            assert arrived is not None
            numbers[_ARRIVED] = arrived.int().expand(keys.shape[:3])
        return numbers

    def observe(self, name: str, received: Tensor) -> None:
        """Adds to a statistic what each slot in use received, `[B, Hkv, S]`, detached."""
        value = self._numbers[name]
        if watched(value):
            self._numbers[name] = value + widened(received, value.shape[-1], 0)
        else:
            value[..., : self.used].add_(received)

    def rewrite_keys(
        self, keys: Tensor, index: Tensor | None = None, there: Tensor | None = None
    ) -> None:
        """Puts other keys in the place of those that are held.

        Args:
            keys: `[B, Hkv, S, D]`; of the slots `index` alone if that is given.
            index: `[B, 1, n]` int64, each slot of a row once.
            there: `[B, 1, n]` bool, which of these are meant; None for all.
        """
        assert self.held is not None
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
            self.keys.shape[1],
            self.names,
            self.columns.device,
        )

    def borrow(self, columns: Tensor, statistics: dict[str, Tensor]) -> None:
        """Takes these in the place of its own, which are equal."""
        self._columns = columns
        self._numbers |= statistics

    def borrows(self, columns: Tensor, statistics: dict[str, Tensor]) -> bool:
        """Whether these very tensors are its columns and statistics."""
        same = (self._numbers.get(name) is value for name, value in statistics.items())
        return self._columns is columns and all(same)

    def record(self) -> None:
        """Notes what is held now, to come back to; until `settle`, nothing leaves its place."""
        columns = None if self._columns is None else self.columns
        statistics = {name: value.clone() for name, value in self.statistics.items()}
        self._record.append((columns, statistics))

    def settle(self, back: int) -> None:
        """Returns to the last record but `back`, if there are any, and frees all the rest."""
        if not self._record:
            return
        columns, statistics = self._record[-1 - back]
        self._record = []
        if columns is None:
            self.reset()
            return
        self.used, capacity = columns.shape[-1], self.capacity
        self._columns = widened(columns, capacity, -1)
        for name, value in statistics.items():
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
