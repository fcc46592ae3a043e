"""Several rectangles of slots in the place of one, where rows or heads keep different numbers.

Their slots are shown as those of one rectangle `[B, Hkv, S]`, S the most that any has: each one's
slots are the last of these, with empty ones, whose column is -1, before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.coded import Coded
from ..attention.inputs import Pieces
from ..attention.lanes import Lanes
from ..statistics import Statistic
from .buffers import put
from .joining import joined
from .layout import allowed, cells, rearranged
from .rectangle import Past, Rectangle, beginning


class Rectangles:
    """Rectangles that each hold some lanes of a layer, with the verbs of one.

    Args:
        lanes: which rows and heads stand in which.
        rectangles: as many.
    """

    def __init__(self, lanes: Lanes, rectangles: list[Rectangle]) -> None:
        self.lanes, self.rectangles = lanes, rectangles

    # As of `Rectangle`.

    complete = False
    """False: in front of a shorter lane's slots others are empty."""

    @property
    def held(self) -> Any:
        """Keys and values of the first one; of the same kind in all."""
        return self.rectangles[0].held

    @property
    def heads(self) -> int:
        """The key/value heads that are stored, Hkv."""
        return self.lanes.heads

    @property
    def used(self) -> int:
        """Slots in use, S."""
        return max(each.used for each in self.rectangles)

    @property
    def turnover(self) -> Any:
        """That of the first one; the policy that is full is the same in all."""
        return self.rectangles[0].turnover

    @property
    def in_use(self) -> int:
        """Slots of a lane before the next token is stored, a mean, rounded."""
        sizes = [len(lanes) for lanes in self.lanes.numbers]
        each = zip(self.rectangles, sizes, strict=True)
        return round(sum(one.in_use * size for one, size in each) / sum(sizes))

    @property
    def columns(self) -> Tensor:
        """`[B, 1|Hkv, S]` int64."""
        return self.lanes.join([each.columns for each in self.rectangles], -1)

    @property
    def held_columns(self) -> Tensor:
        """The same as `columns`: what is joined has no room for more slots."""
        return self.columns

    @property
    def statistics(self) -> dict[Statistic, Tensor]:
        """Those per slot, each `[B, Hkv, S]`."""
        return {part: self._statistic(part) for part in self.rectangles[0].statistics}

    def _statistic(self, part: Statistic) -> Tensor:
        """One statistic; slots that a lane does not have hold what a slot begins with."""
        each = [rectangle.statistics[part] for rectangle in self.rectangles]
        return self.lanes.join(each, part.start)

    @property
    def arrived(self) -> Tensor:
        """The positions that the slots' keys came with, `[B, 1|Hkv, S]` int32, as `columns`."""
        return self.lanes.join([each.arrived for each in self.rectangles], 0)

    @property
    def keys(self) -> Tensor:
        """`[B, Hkv, S, D]`."""
        return self.lanes.join([each.keys for each in self.rectangles], 0)

    @property
    def values(self) -> Tensor:
        """`[B, Hkv, S, Dv]`."""
        return self.lanes.join([each.values for each in self.rectangles], 0)

    def turned(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the store turned them."""
        each = [rectangle.turned() for rectangle in self.rectangles]
        keys, values = (self.lanes.join(same, 0) for same in zip(*each, strict=True))
        return keys, values

    def coded(self) -> tuple[Coded, Coded] | None:
        """None: codes are of one rectangle."""
        return None

    def pieces(self, codes: bool) -> Pieces:
        """What attention needs of each; see `SlotLayer.pieces`."""
        return Pieces(self.lanes, tuple(each.piece(codes) for each in self.rectangles))

    def move(self, device: torch.device | str) -> None:
        """Moves keys and values to a device."""
        for rectangle in self.rectangles:
            rectangle.move(device)

    def tensors(self) -> Iterator[Tensor]:
        """All that is held, for counting bytes."""
        for rectangle in self.rectangles:
            yield from rectangle.tensors()
        yield from self.lanes.tensors()

    def numbers(self) -> dict[str, Any]:
        """With `named_tensors`, all that brings them back; see `restored`."""
        lanes = self.lanes
        where = {"rows": lanes.rows, "heads": lanes.heads, "by_head": lanes.by_head}
        each = [rectangle.numbers() for rectangle in self.rectangles]
        return {**where, "lanes": lanes.numbers, "rectangles": each}

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors of each rectangle, each name behind the rectangle's number."""
        each = [rectangle.named_tensors() for rectangle in self.rectangles]
        return {f"{i}.{name}": tensor for i, one in enumerate(each) for name, tensor in one.items()}

    @classmethod
    def restored(
        cls, empty: Rectangle, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Rectangles:
        """Those whose `numbers` and `named_tensors` these are.

        Args:
            empty: a rectangle of the same kind.
            numbers, tensors: see above.
        """
        device = next(iter(tensors.values())).device
        where = numbers["rows"], numbers["heads"], numbers["by_head"]
        found = cls(Lanes(*where, numbers["lanes"], device), [])
        for i, each in enumerate(numbers["rectangles"]):
            start = f"{i}."
            mine = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            rectangle = Rectangle(empty.store, empty.parts, empty.arrivals)
            rectangle.restore(each, mine)
            found.rectangles.append(rectangle)
        return found

    def narrow_statistics(self, statistics: tuple[Statistic, ...]) -> None:
        """Forgets all statistics per slot but these."""
        for rectangle in self.rectangles:
            rectangle.narrow_statistics(statistics)

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
        # The single token of a forward came at the same time in every row.
        lanes, same = self.lanes, complete and in_free_slot
        mine = lanes.split_columns(columns, same)
        came = (None,) * len(mine) if arrived is None else lanes.split(arrived)
        new = zip(self.rectangles, lanes.split(keys), lanes.split(values), mine, came, strict=True)
        for rectangle, new_keys, new_values, new_columns, positions in new:
            how = complete, in_free_slot, positions
            rectangle.append(new_keys, new_values, new_columns, *how)

    def columns_after(self, columns: Tensor, in_free_slot: bool) -> Tensor:
        """The `columns` after `append` will have stored new tokens; see there."""
        each = zip(self.rectangles, self.lanes.split(columns), strict=True)
        return self.lanes.join([one.columns_after(mine, in_free_slot) for one, mine in each], -1)

    def observe(self, part: Statistic, new: Any, several: bool) -> None:
        """Joins what a forward gave to a statistic per slot; see `SlotLayer.observe`."""
        if part.adds:
            for rectangle, mine in self._apart(new):
                rectangle.observe(part, mine, several)
            return
        # Joined first: `Statistic.join` is handed all rows and heads in one tensor.
        value = joined(part, self._statistic(part), new, several)
        for rectangle, mine in self._apart(value):
            rectangle.take(part, mine)

    def rewrite_keys(
        self, keys: Tensor, index: Tensor | None = None, there: Tensor | None = None
    ) -> None:
        """Puts other keys in the place of those that are held; see `SlotLayer.rewrite_keys`."""
        if index is not None:
            whole = self.keys
            if there is not None:
                place = index[..., None].expand_as(keys)
                keys = torch.where(there[..., None], keys, whole.gather(2, place))
            keys = put(whole, index, keys)
        for rectangle, mine in self._apart(keys):
            rectangle.rewrite_keys(mine)

    def keep_all(self) -> None:
        """Drops nothing; no policy is known to be full any more."""
        for rectangle in self.rectangles:
            rectangle.keep_all()

    def mask(self, columns: Tensor, policy: int | None) -> None:
        """Empties the slots whose column is -1 here; nothing leaves its place."""
        for rectangle, mine in self._apart(columns):
            rectangle.mask(mine, policy)

    def can_free(self, gone: Tensor) -> bool:
        """Whether `free` may drop these, `[B, 1|Hkv, 1]`; else `keep` does."""
        if self.lanes.by_head and gone.shape[1] < self.heads:
            return False
        return all(rectangle.can_free(mine) for rectangle, mine in self._gone(gone))

    def free(self, gone: Tensor, policy: int | None) -> None:
        """Drops one slot in every row and head; see `SlotLayer.free`."""
        for rectangle, mine in self._gone(gone):
            rectangle.free(mine, policy)

    def drop_newest(self, count: int) -> None:
        """Drops the last `count` slots of each lane; see `Rectangle.drop_newest`."""
        for rectangle in self.rectangles:
            rectangle.drop_newest(count)

    def past(self) -> list[Past]:
        """What is held now, to come back to, by rectangle."""
        return [past for rectangle in self.rectangles for past in rectangle.past()]

    def come_back(self, pasts: Sequence[Past]) -> None:
        """Holds what it held then; what came since is empty. Nothing has left its place."""
        for rectangle, past in zip(self.rectangles, pasts, strict=True):
            rectangle.come_back([past])

    def observe_past(
        self, pasts: Sequence[Past], part: Statistic, numbers: Tensor, columns: Tensor
    ) -> None:
        """Joins numbers of tokens to what was held; see `SlotLayer.observe_tokens`."""
        lanes = self.lanes
        told = lanes.split(numbers), lanes.split_columns(columns, same=False)
        for rectangle, past, mine, theirs in zip(self.rectangles, pasts, *told, strict=True):
            rectangle.observe_past([past], part, mine, theirs)

    def select_rows(self, rows: Tensor) -> Rectangle | Rectangles:
        """What there is once row i is what row `rows[i]` was."""
        if not len(rows):
            return self.united().select_rows(rows)
        lanes, places = self.lanes.selected(rows.tolist())
        left = [
            rectangle.select_rows(torch.tensor(mine, device=rows.device))
            for rectangle, mine in zip(self.rectangles, places, strict=True)
            if mine
        ]
        found = Rectangles(lanes, left)
        return found if len(left) > 1 else found.united()

    # What one rectangle does not have.

    def united(self) -> Rectangle:
        """One rectangle of all lanes, without room for more slots."""
        first = self.rectangles[0]
        assert first.held is not None
        one = Rectangle(first.store, first.parts, first.arrivals)
        one.used, one.gaps, one.held_columns = self.used, True, self.columns
        used = [
            [buffer[:, :, : each.used] for buffer in each.held.buffers]
            for each in self.rectangles
            if each.held is not None
        ]
        buffers = (self.lanes.join(alike, 0) for alike in zip(*used, strict=True))
        one.held = first.held.with_buffers(buffers)
        for name in first.held_numbers:
            same = [each.held_numbers[name][..., : each.used] for each in self.rectangles]
            one.held_numbers[name] = self.lanes.join(same, beginning(name))
        return one

    def _apart(self, tensor: Tensor) -> Iterator[tuple[Rectangle, Tensor]]:
        """Each rectangle with its part of a tensor of all slots, `[B, 1|Hkv, S, ...]`."""
        for rectangle, mine in zip(self.rectangles, self.lanes.split(tensor), strict=True):
            yield rectangle, mine[:, :, mine.shape[2] - rectangle.used :]

    def _gone(self, gone: Tensor) -> Iterator[tuple[Rectangle, Tensor]]:
        """Each rectangle with the places in it of `[B, 1|Hkv, 1]` slots."""
        size = self.used
        for rectangle, mine in zip(self.rectangles, self.lanes.split(gone), strict=True):
            yield rectangle, mine - (size - rectangle.used)

    def keep(self, columns: Tensor, counts: list[list[int]], policy: int | None) -> None:
        """Drops the slots whose column is -1 here; no lane changes its rectangle.

        Args:
            columns: `[B, 1|Hkv, S]` int64.
            counts: how many slots each row and head keeps.
            policy: the policy that is full now; see `Turnover`.
        """
        each = zip(self._apart(columns), cells(counts, self.lanes), strict=True)
        for (rectangle, mine), numbers in each:
            rectangle.keep(mine, min(numbers), max(numbers), policy)


Form = Rectangle | Rectangles
"""A layer's slots."""


def kept(form: Form, columns: Tensor, policy: int | None, divides: bool) -> Form:
    """A layer's slots without those whose column is -1 here.

    Args:
        form: as they are.
        columns: `[B, 1|Hkv, S]` int64; with a head axis of Hkv each head has its own.
        policy: the policy that is full now; see `Turnover`.
        divides: whether one rectangle may become several.
    """
    counts = (columns >= 0).sum(-1)
    if isinstance(form, Rectangle):
        fewest, most = torch.stack(counts.aminmax()).tolist()
        if not divides or most - fewest <= allowed(most):
            form.keep(columns, fewest, most, policy)
            return form
    each = counts.tolist()
    wanted = rearranged(each, form.lanes)
    if wanted is not None:
        by_head, groups = wanted
        rows, heads = len(each), form.heads
        form = form if isinstance(form, Rectangle) else form.united()
        if len(groups) > 1:
            lanes = Lanes(rows, heads, by_head, groups, columns.device)
            form = Rectangles(lanes, form.divided(lanes))
    if isinstance(form, Rectangle):
        form.keep(columns, min(map(min, each)), max(map(max, each)), policy)
        return form
    form.keep(columns, each, policy)
    for rectangle in form.rectangles:
        rectangle.hold_alone()
    return form
