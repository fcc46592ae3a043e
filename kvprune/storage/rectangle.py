"""Slots that stand side by side, as many for each row and head: all of a layer's, or of some lanes.

See `layer.py` for what a layer is, and `several.py` for layers of several rectangles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention.coded import Coded
from ..attention.inputs import Piece
from ..attention.lanes import Lanes
from ..statistics import Statistic
from .buffers import (
    begun,
    extended,
    first_slots,
    gathered,
    numbers_at,
    put,
    roomier,
    spare,
    watched,
    widened,
)
from .joining import joined
from .plain import Plain
from .quantized import Quantized, QuantizedSlots
from .turnover import Stage, Turnover

Store = type[Plain] | Quantized
"""Makes what holds keys and values."""

ARRIVED = "arrived"


def beginning(name: Statistic | str) -> float:
    """What a slot without a token holds of a statistic, or of the arrivals."""
    return 0 if isinstance(name, str) else name.start


@dataclass(frozen=True)
class Past:
    """What a rectangle held, to come back to: columns, and the statistics per slot."""

    columns: Tensor | None
    statistics: dict[Statistic, Tensor]


class Rectangle:
    """Columns, numbers, and held keys and values, which one gather moves together.

    There is room for `capacity` slots, of which the first `used` are in use: `[B, 1|Hkv, capacity]`
    for columns, `[B, Hkv, capacity]` for each statistic and, with `arrivals`, for the position that
    a slot's key came with (int32). `held` has the keys and values. Behind those in use statistics
    are what a token begins with, and all else may be anything. A slot in use whose column is -1 is
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
        # Whether its buffers are views of what several rectangles share.
        self._shares = False

    lanes = None
    """It stands alone; see `Rectangles`."""

    @property
    def rectangles(self) -> list[Rectangle]:
        """Itself alone."""
        return [self]

    @property
    def columns(self) -> Tensor:
        """`[B, 1|Hkv, S]` int64, -1 for an empty slot."""
        held = self.held_columns
        assert held is not None
        return first_slots(held, self.used)

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
        """Those per slot, each `[B, Hkv, S]`, not copied."""
        held = self.held_numbers
        return {part: first_slots(held[part], self.used) for part in self.parts if part in held}

    @property
    def arrived(self) -> Tensor:
        """The positions that the slots' keys came with, `[B, 1|Hkv, S]` int32, as `columns`."""
        return self.held_numbers[ARRIVED][:, : self.columns.shape[1], : self.used]

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

    @property
    def heads(self) -> int:
        """Key/value heads, Hkv."""
        assert self.held is not None
        return self.held.heads

    @property
    def in_use(self) -> int:
        """Slots in use before the next token is stored; a free one does not count."""
        return self.used - (self.turnover.slot is not None)

    def turned(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the store turned them."""
        if isinstance(self.held, QuantizedSlots):
            return self.held.turned(self.used)
        return self.keys, self.values

    def coded(self) -> tuple[Coded, Coded] | None:
        """Keys and values as codes, where they are held as codes."""
        return self.held.coded(self.used) if isinstance(self.held, QuantizedSlots) else None

    def piece(self, codes: bool) -> Piece:
        """What attention needs, where this is one rectangle of several; see `SlotLayer.pieces`."""
        assert self.held is not None and self.held_columns is not None
        coded = self.coded() if codes else None
        if coded is None:
            return Piece(*self.turned(), self.held_columns, self.complete)
        keys, values = (each.shape_alone(self.held.dtype) for each in coded)
        return Piece(keys, values, self.held_columns, self.complete, coded)

    def move(self, device: torch.device | str) -> None:
        """Moves keys and values to a device."""
        if self.held is not None:
            self.held.move(device)

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
            held["arrived"] = self.held_numbers[ARRIVED][..., : self.used]
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
        self.held_numbers = {
            name: roomier(value, room, beginning(name)) for name, value in stored.items()
        }

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
        numbers = self.held_numbers
        for part in self.parts:
            numbers[part] = begun(numbers.get(part), keys, self.used, part.start)
        if self.arrivals:
            assert arrived is not None
            new = arrived.int().expand(keys.shape[:3])
            numbers[ARRIVED] = extended(numbers.get(ARRIVED), new, start)

    def observe(self, part: Statistic, new: Any, several: bool) -> None:
        """Joins what a forward gave to a statistic per slot; see `SlotLayer.observe`."""
        held = self.held_numbers[part]
        if part.adds and not watched(held):
            first_slots(held, self.used).add_(new)
            return
        self.take(part, joined(part, first_slots(held, self.used), new, several))

    def take(self, part: Statistic, value: Tensor) -> None:
        """Takes `[B, Hkv, S]` for what a statistic knows of the slots."""
        held = self.held_numbers[part]
        if watched(held):
            self.held_numbers[part] = torch.cat([value, held[..., self.used :]], -1)
        else:
            # In its place, since layers that decode together share it.
            first_slots(held, self.used).copy_(value)

    def rewrite_keys(
        self, keys: Tensor, index: Tensor | None = None, there: Tensor | None = None
    ) -> None:
        """Puts other keys in the place of those that are held; see `SlotLayer.rewrite_keys`."""
        # Others are read-only: what is held in codes is never coded again.
        assert isinstance(self.held, Plain)
        self.held.rewrite_keys(keys, self.used, index, there)

    def keep_all(self) -> None:
        """Drops nothing; no policy is known to be full any more."""
        self.turnover = replace(self.turnover, policy=None)

    def mask(self, columns: Tensor, policy: int | None) -> None:
        """Empties the slots whose column is -1 here, `[B, 1|Hkv, S]`; nothing leaves its place."""
        self.held_columns, self.gaps = widened(columns, self.capacity, -1), True
        self.turnover = self.turnover.freed(self.turnover.slot, policy)

    def keep(self, columns: Tensor, fewest: int, most: int, policy: int | None) -> None:
        """Drops the slots whose column is -1 here.

        Args:
            columns: `[B, 1|Hkv, S]` int64; with a head axis of Hkv each head has its own.
            fewest, most: how many slots a row and head keeps.
            policy: the policy that is full now; see `Turnover`.
        """
        if self.used - most > 1 or self.capacity - most > spare(most):
            self._compact(columns, fewest, most)
            self.gaps, self.turnover = fewest < most, Turnover(policy=policy)
            return
        self.held_columns = widened(columns, self.capacity, -1)
        slot = columns.argmin(-1, keepdim=True) if most < self.used else None
        self.turnover = self.turnover.freed(slot, policy)
        # As it will be once the free slot is filled.
        self.gaps = fewest < (self.used if slot is None else self.used - 1)

    def drop_newest(self, count: int) -> None:
        """Drops the last `count` slots, and the room that they took; no other leaves its place."""
        assert self.held is not None
        self.used -= count
        # Copies: a view would keep the larger buffers.
        self.held_columns = self.columns.clone()
        self.held = self.held.with_buffers(b[:, :, : self.used].clone() for b in self.held.buffers)
        for name, value in self.held_numbers.items():
            self.held_numbers[name] = value[..., : self.used].clone()
        self.gaps = bool((self.held_columns < 0).any())

    def can_free(self, gone: Tensor) -> bool:
        """Whether `free` may drop these, `[B, 1|Hkv, 1]`; else `keep` does."""
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

    def past(self) -> list[Past]:
        """What is held now, to come back to, by rectangle."""
        columns = None if self.held_columns is None else self.columns
        statistics = {part: value.clone() for part, value in self.statistics.items()}
        return [Past(columns, statistics)]

    def come_back(self, pasts: Sequence[Past]) -> None:
        """Holds what it held then; what came since is empty. Nothing has left its place."""
        (past,) = pasts
        assert past.columns is not None
        self.used, capacity = past.columns.shape[-1], self.capacity
        self.held_columns = widened(past.columns, capacity, -1)
        for name, value in past.statistics.items():
            self.held_numbers[name] = widened(value, capacity, beginning(name))

    def _compact(self, columns: Tensor, fewest: int, size: int) -> None:
        """Moves the `fewest` to `size` slots that stay to the front of new buffers."""
        assert self.held is not None
        if fewest == size:
            order = (columns >= 0).nonzero()[:, -1].view(*columns.shape[:2], size)
        else:
            order = (columns < 0).byte().argsort(dim=-1, stable=True)[..., :size]
        self.held_columns = widened(columns.gather(-1, order), size + 1, -1)
        self.held.gather(order)
        for name, value in self.held_numbers.items():
            moved = gathered(value, order, 1)
            moved[..., size:] = beginning(name)
            self.held_numbers[name] = moved
        self.used, self._shares = size, False

    def observe_past(
        self, pasts: Sequence[Past], part: Statistic, numbers: Tensor, columns: Tensor
    ) -> None:
        """Joins numbers of tokens to what was held; see `SlotLayer.observe_tokens`."""
        (past,) = pasts
        if past.columns is not None and part in past.statistics:
            new = numbers_at(past.columns, numbers, columns)
            past.statistics[part] = part.join(past.statistics[part], new)

    def select_rows(self, rows: Tensor) -> Rectangle:
        """Itself, once row i is what row `rows[i]` was."""
        assert self.held is not None and self.held_columns is not None
        self.held.select_rows(rows)
        self.held_columns = self.held_columns.index_select(0, rows)
        self.turnover = self.turnover.select_rows(rows)
        for name, value in self.held_numbers.items():
            self.held_numbers[name] = value.index_select(0, rows)
        return self

    def divided(self, lanes: Lanes) -> list[Rectangle]:
        """The rectangles of a layer of which this one has all lanes, as views; see `hold_alone`."""
        assert self.held is not None
        buffers = [lanes.split(buffer) for buffer in self.held.buffers]
        columns = lanes.split(self.columns)
        numbers = {name: lanes.split(value) for name, value in self.held_numbers.items()}
        found = []
        for i, mine in enumerate(columns):
            one = Rectangle(self.store, self.parts, self.arrivals)
            one.used, one.gaps, one.held_columns = self.used, True, widened(mine, self.capacity, -1)
            one.held = self.held.with_buffers(each[i] for each in buffers)
            one.held_numbers = {name: each[i] for name, each in numbers.items()}
            one._shares = True
            found.append(one)
        return found

    def hold_alone(self) -> None:
        """Copies its part of shared buffers, which would keep the memory of all others, too."""
        if not self._shares or self.held is None:
            return
        self.held = self.held.with_buffers(buffer.clone() for buffer in self.held.buffers)
        self.held_numbers = {name: value.clone() for name, value in self.held_numbers.items()}
        self._shares = False
