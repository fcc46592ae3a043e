"""Slots that stand side by side, as many for each row and head: all of a layer's, or of some lanes.

See `layer.py` for what a layer is, and `kvprune.attention.lanes` for layers of several rectangles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.lanes import Lanes
from ..errors import KVPruneError
from ..statistics import Block, Statistic, statistic_dtype
from .buffers import extended, gathered, put, roomier, spare, watched, widened
from .plain import Plain
from .quantized import Quantized, QuantizedSlots
from .turnover import Stage, Turnover

Store = type[Plain] | Quantized
"""Makes what holds keys and values."""

ARRIVED = "arrived"


@dataclass(frozen=True)
class Past:
    """What a rectangle held, to come back to: columns, and the statistics per slot."""

    columns: Tensor | None
    statistics: dict[Statistic, Tensor]


class Rectangle:
    """Columns, numbers, and held keys and values, which one gather moves together.

    There is room for `capacity` slots, of which the first `used` are in use: `[B, 1|Hkv, capacity]`
    for columns, `[B, Hkv, capacity]` for each statistic and, with `arrivals`, for the position that
    a slot's key came with (int32). `held` has the keys and values. A slot whose column is -1 is
    empty. Slots come in no order.

    Args:
        store: makes what holds keys and values.
        parts: the statistics per slot.
        arrivals: whether slots keep the position that their key came with.

    Attributes:
        store, parts, arrivals: see above.
        held: keys and values; None before the first tokens.
        held_columns: `[B, 1|Hkv, capacity]` int64; None before the first tokens.
        held_numbers: by name, each `[B, Hkv, capacity]`.
        used: slots in use.
        gaps: whether slots in use may be empty, the free slot left out.
        turnover: where the next token goes, and who is full.
    """

    def __init__(
        self, store: Store, parts: tuple[Statistic, ...] = (), arrivals: bool = False
    ) -> None:
        self.store, self.parts, self.arrivals = store, parts, arrivals
        self.used = 0
        self.gaps = False
        self.turnover = Turnover()
        self.held: Plain | QuantizedSlots | None = None
        self.held_columns: Tensor | None = None
        self.held_numbers: dict[Statistic | str, Tensor] = {}

    @property
    def columns(self) -> Tensor:
        """`[B, 1|Hkv, S]` int64, -1 for an empty slot."""
        held = self.held_columns
        assert held is not None
        return held if self.used == held.shape[-1] else held[..., : self.used]

    @property
    def capacity(self) -> int:
        """Slots that there is room for."""
        return 0 if self.held_columns is None else self.held_columns.shape[-1]

    @property
    def complete(self) -> bool:
        """Whether it is known that no slot in use is empty."""
        return not self.gaps and self.turnover.slot is None

    @property
    def statistics(self) -> dict[Statistic, Tensor]:
        """Those per slot, each `[B, Hkv, S]`, views."""
        held = self.held_numbers
        return {part: held[part][..., : self.used] for part in self.parts if part in held}

    @property
    def arrived(self) -> Tensor:
        """The positions that the slots' keys came with, `[B, Hkv, S]` int32."""
        return self.held_numbers[ARRIVED][..., : self.used]

    @property
    def keys(self) -> Tensor:
        """`[B, Hkv, S, D]`."""
        assert self.held is not None
        return self.held.keys(self.used)

    @property
    def values(self) -> Tensor:
        """`[B, Hkv, S, Dv]`."""
        assert self.held is not None
        return self.held.values(self.used)

    def tensors(self) -> Iterator[Tensor]:
        """All that is held, for counting bytes."""
        yield from () if self.held is None else self.held.tensors()
        yield from (t for t in (self.held_columns, self.turnover.slot) if t is not None)
        yield from self.held_numbers.values()

    def numbers(self) -> dict[str, Any]:
        """With `named_tensors`, all that brings the rectangle back as it is (see `restore`)."""
        held = {} if self.held is None else self.held.numbers()
        return {"used": self.used, "capacity": self.capacity, "gaps": self.gaps, **held}

    def named_tensors(self) -> dict[str, Tensor]:
        """The slots in use, and the free slot; `columns` is one object where layers share it."""
        assert self.held is not None
        held = {**self.held.named_tensors(self.used), "columns": self.columns}
        held |= {f"statistics.{part!r}": value for part, value in self.statistics.items()}
        if self.arrivals:
            held["arrived"] = self.arrived
        slot = self.turnover.slot
        return held if slot is None else {**held, "hole": slot}

    def restore(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Becomes the rectangle whose `numbers` and `named_tensors` these are.

        The room for more slots comes back too, since it decides when slots are moved, and their
        order decides how sums round. Statistics that nobody wants here are left out.
        """
        self.used, self.gaps = numbers["used"], numbers["gaps"]
        self.turnover = Turnover().freed(tensors.get("hole"), None)
        room = numbers["capacity"] - self.used
        self.held_columns = roomier(tensors["columns"], room, -1)
        self.held = self.store.restored(numbers, tensors, room)
        stored: dict[Statistic | str, Tensor] = {
            part: tensors[f"statistics.{part!r}"] for part in self.parts
        }
        if self.arrivals:
            stored[ARRIVED] = tensors["arrived"]
        self.held_numbers = {name: roomier(value, room, 0) for name, value in stored.items()}

    def narrow_statistics(self, statistics: tuple[Statistic, ...]) -> None:
        """Forgets all statistics per slot but these."""
        self.parts = tuple(part for part in self.parts if part in statistics)
        kept = {*self.parts, ARRIVED}
        self.held_numbers = {n: value for n, value in self.held_numbers.items() if n in kept}

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        columns: Tensor,
        complete: bool,
        in_free_slot: bool,
        arrived: Tensor | None,
    ) -> None:
        """Stores new tokens; see `SlotLayer.append`."""
        free_slot = self.turnover.slot
        if in_free_slot and free_slot is not None:
            self._fill(free_slot, keys, values, columns, arrived)
            self.gaps = self.gaps or not complete
        else:
            self.gaps = self.gaps or free_slot is not None or not complete
            self._extend(keys, values, columns, arrived)
        self.turnover = self.turnover.stored(single=complete and columns.shape[-1] == 1)

    def columns_after(self, columns: Tensor, in_free_slot: bool) -> Tensor:
        """The `columns` after `append` will have stored new tokens; see there."""
        if self.held_columns is None:
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
        numbers = self.held_numbers
        if self.arrivals:
            assert arrived is not None
            where = free_slot.expand(-1, keys.shape[1], -1)
            numbers[ARRIVED] = put(numbers[ARRIVED], where, arrived.int().expand_as(where))
        if self.turnover.stage is Stage.TAKEN:
            return
        self.held_columns = put(self.held_columns, free_slot, columns.expand_as(free_slot))
        for part in self.parts:
            where = free_slot.expand(-1, keys.shape[1], -1)
            numbers[part] = put(numbers[part], where, part.start)

    def _extend(
        self, keys: Tensor, values: Tensor, columns: Tensor, arrived: Tensor | None
    ) -> None:
        start, self.used = self.used, self.used + columns.shape[-1]
        if self.held_columns is None:
            # Not copied where it need not be: layers that hold the same columns share the
            # tensor, by which masks are memoised.
            self.held_columns = columns
        else:
            columns = columns.expand(-1, self.held_columns.shape[1], -1)
            self.held_columns = extended(self.held_columns, columns, start)
        if self.held is None:
            self.held = self.store.of(keys, values)
        else:
            self.held.append(keys, values, start)
        for name, value in self._new_numbers(keys, arrived).items():
            self.held_numbers[name] = extended(self.held_numbers.get(name), value, start)

    def _new_numbers(self, keys: Tensor, arrived: Tensor | None) -> dict[Statistic | str, Tensor]:
        """New tokens' numbers, each `[B, Hkv, Q]`."""
        dtype = statistic_dtype(keys.dtype)
        numbers: dict[Statistic | str, Tensor] = {
            part: torch.full_like(keys[..., 0], part.start, dtype=dtype) for part in self.parts
        }
        if self.arrivals:
            assert arrived is not None
            numbers[ARRIVED] = arrived.int().expand(keys.shape[:3])
        return numbers

    def observe(self, part: Statistic, new: Any, several: bool) -> None:
        """Joins what a forward gave to a statistic per slot; see `SlotLayer.observe`."""
        held = self.held_numbers[part]
        if part.adds and not watched(held):
            held[..., : self.used].add_(new)
            return
        self.take(part, joined(part, held[..., : self.used], new, several))

    def take(self, part: Statistic, value: Tensor) -> None:
        """Takes `[B, Hkv, S]` for what a statistic knows of the slots."""
        held = self.held_numbers[part]
        if watched(held):
            self.held_numbers[part] = torch.cat([value, held[..., self.used :]], -1)
        else:
            # In its place, since layers that decode together share it.
            held[..., : self.used].copy_(value)

    def mask(self, columns: Tensor, policy: int | None) -> None:
        """Empties the slots whose column is -1 here, `[B, 1|Hkv, S]`; nothing leaves its place."""
        self.held_columns, self.gaps = widened(columns, self.capacity, -1), True
        self.turnover = self.turnover.freed(self.turnover.slot, policy)

    def keep(self, columns: Tensor, fewest: int, most: int, policy: int | None) -> None:
        """Drops the slots whose column is -1 here.

        Args:
            columns: `[B, 1|Hkv, S]` int64; with a head axis of Hkv the heads part ways.
            fewest, most: how many slots a row and head keeps.
            policy: the policy that is full now; see `Turnover`.
        """
        if self.used - most > 1 or self.capacity - most > spare(most):
            self._compact(columns, most)
            self.gaps, self.turnover = fewest < most, Turnover(policy=policy)
            return
        self.held_columns = widened(columns, self.capacity, -1)
        slot = columns.argmin(-1, keepdim=True) if most < self.used else None
        self.turnover = self.turnover.freed(slot, policy)
        # As it will be once the free slot is filled.
        self.gaps = fewest < (self.used if slot is None else self.used - 1)

    def can_free(self, gone: Tensor) -> bool:
        """Whether `free` may drop these, `[B, 1|Hkv, 1]`."""
        fits = self.turnover.slot is None and self.capacity - self.used < spare(self.used)
        return fits and gone.shape[1] == self.columns.shape[1]

    def free(self, gone: Tensor, policy: int | None) -> None:
        """Drops one slot in every row and head; see `SlotLayer.free`."""
        assert self.held_columns is not None
        # Not in place: layers may share the tensor until one of them drops something.
        self.held_columns = self.held_columns.scatter(-1, gone, -1)
        self.turnover = self.turnover.freed(gone, policy)

    def borrow(self, columns: Tensor, statistics: dict[Statistic, Tensor]) -> None:
        """Takes these in the place of its own, which are equal."""
        self.held_columns = columns
        for part, value in statistics.items():
            self.held_numbers[part] = value

    def borrows(self, columns: Tensor, statistics: dict[Statistic, Tensor]) -> bool:
        """Whether these very tensors are its columns and statistics."""
        same = (self.held_numbers.get(name) is value for name, value in statistics.items())
        return self.held_columns is columns and all(same)

    def past(self) -> Past:
        """What is held now, to come back to."""
        columns = None if self.held_columns is None else self.columns
        return Past(columns, {part: value.clone() for part, value in self.statistics.items()})

    def come_back(self, past: Past) -> None:
        """Holds what it held then; what came since is empty. Nothing has left its place."""
        assert past.columns is not None
        self.used, capacity = past.columns.shape[-1], self.capacity
        self.held_columns = widened(past.columns, capacity, -1)
        for name, value in past.statistics.items():
            self.held_numbers[name] = widened(value, capacity, 0)

    def _compact(self, columns: Tensor, size: int) -> None:
        """Moves the `size` slots that stay to the front of new buffers, with one to spare."""
        assert self.held is not None
        order = (columns < 0).byte().argsort(dim=-1, stable=True)[..., :size]
        self.held_columns = widened(columns.gather(-1, order), size + 1, -1)
        self.held.gather(order)
        for name, value in self.held_numbers.items():
            self.held_numbers[name] = gathered(value, order, 1)
        self.used = size

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        assert self.held is not None and self.held_columns is not None
        self.held.select_rows(rows)
        self.held_columns = self.held_columns.index_select(0, rows)
        self.turnover = self.turnover.select_rows(rows)
        for name, value in self.held_numbers.items():
            self.held_numbers[name] = value.index_select(0, rows)

    def divided(self, lanes: Lanes) -> list[Rectangle]:
        """The rectangles of a layer of which this one has all lanes."""
        assert self.held is not None
        buffers = [lanes.split(buffer) for buffer in self.held.buffers]
        columns = lanes.split(self.columns)
        numbers = {name: lanes.split(value) for name, value in self.held_numbers.items()}
        found = []
        for i, mine in enumerate(columns):
            one = Rectangle(self.store, self.parts, self.arrivals)
            one.used, one.gaps, one.held_columns = self.used, True, widened(mine, self.capacity, -1)
            # Copies: views would keep all of this alive.
            one.held = self.held.with_buffers(each[i].clone() for each in buffers)
            one.held_numbers = {name: each[i].clone() for name, each in numbers.items()}
            found.append(one)
        return found


def united(rectangles: Sequence[Rectangle], lanes: Lanes) -> Rectangle:
    """One rectangle of all the lanes of a layer, without room for more slots."""
    first = rectangles[0]
    assert first.held is not None
    one = Rectangle(first.store, first.parts, first.arrivals)
    one.used, one.gaps = max(each.used for each in rectangles), True
    one.held_columns = lanes.join([each.columns for each in rectangles], -1)
    used = [
        [buffer[:, :, : each.used] for buffer in each.held.buffers]
        for each in rectangles
        if each.held is not None
    ]
    one.held = first.held.with_buffers(lanes.join(same, 0) for same in zip(*used, strict=True))
    one.held_numbers = {
        name: lanes.join([each.held_numbers[name][..., : each.used] for each in rectangles], 0)
        for name in first.held_numbers
    }
    return one


def joined(part: Statistic, before: Tensor, new: Any, several: bool) -> Tensor:
    """What `Statistic.join` makes of `[B, Hkv, S]`, checked; see `SlotLayer.observe`."""
    value = part.join(before, new)
    _check_joined(part, before, value)
    if several and part.checked:
        _check_comparable(part, value, new)
    return value


def _check_joined(part: Statistic, before: Tensor, value: Any) -> None:
    fits = isinstance(value, Tensor) and value.shape == before.shape
    if not fits or value.dtype != before.dtype or value.device != before.device:
        raise KVPruneError(
            f"{part!r}: expected join() to return {before.dtype} of shape {list(before.shape)} on "
            f"{before.device}, as it was handed, got {described(value)}"
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


def described(value: Any) -> str:
    """What somebody returned, for an error."""
    if isinstance(value, tuple):
        return f"({', '.join(map(described, value))})"
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)} on {value.device}"
    return type(value).__name__
