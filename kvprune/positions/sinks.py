"""Positions inside the cache, for streams past the trained context (arXiv 2309.17453, 3.2).

A token's position is its place among the slots that are left, not in the text. There are two
ways: `by_slot.py` is for whatever policies leave; here is the cheap one, for sinks and a window.

RoPE sees distances alone, so the window keeps the positions at which its keys were turned, new
tokens count on behind it, and only the few sinks are turned anew in each step, to sit right
before it: always from the keys as they first came, so that no error adds up. Every so often,
when positions have run further than a layer has slots, all is anchored anew: the keys of the
window are turned back together, and numbers stay small and exact however long the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import KVPruneError
from ..models.devices import Copies
from ..storage.layer import SlotLayer
from ..storage.rows import RowNumbers
from .base import AtLayer, Positions
from .by_slot import numbers_of
from .rotary import Rotation, check_reach

_BY_LAYER = ("home", "turn", "gap")


_FAR = torch.iinfo(torch.int64).max // 2


@dataclass(frozen=True)
class _Placement:
    """The slots of a layer's sinks.

    place: `[B, 1, sinks]`, the slot of each; for one that is in none any slot, to be read alone.
    arrived: `[B, 1, sinks]`, which have just come in; None for none, as in almost every step.
    held: which slots to write to; None where every sink is in one, which is then `place`.
    """

    place: Tensor
    arrived: Tensor | None
    held: _Held | None


@dataclass(frozen=True)
class _Held:
    """The slots to write sinks to: as many as sinks, or all if there are fewer; `[B, 1, n]`.

    index: the slots, each once, as two writers of one slot would leave it undefined.
    there: whether a slot holds a sink.
    sink: which sink a slot holds.
    """

    index: Tensor
    there: Tensor
    sink: Tensor


def _held_by(same: Tensor) -> _Held:
    """The slots to write to, by which slot holds which sink, `[B, sinks, S]` bool."""
    any_sink = same.any(1)
    index = any_sink.byte().topk(min(same.shape[1:]), dim=-1).indices
    sink = same.byte().argmax(1).gather(-1, index)
    there = any_sink.gather(-1, index)
    return _Held(index[:, None], there[:, None], sink[:, None])


class SinkPositions(Positions):
    """The positions of one cache's rows, and the keys of their sinks as they first came.

    A token's *number* counts its row's valid tokens from 0; its position lags behind that by
    an offset, which grows with what is evicted.

    Args:
        sinks: how many of a row's first tokens sit right before the oldest of the others.
        rotations: by layer; see `rotations_of`.
        limit: the position from which on the model changes its frequencies; None if never.
    """

    def __init__(self, sinks: int, rotations: list[Rotation | None], limit: int | None) -> None:
        self.sinks, self.limit = sinks, limit
        self._rotations = rotations
        self._offset: Tensor | None = None
        self._copies = Copies()
        # By layer: keys `[B, Hkv, sinks, D]`, and by how much those in the slots are turned.
        self._home: list[Tensor | None] = [None] * len(rotations)
        self._turn: list[Tensor | None] = [None] * len(rotations)
        # By layer `[B]`: the gap that pruning left behind the sinks, -1 as long as nothing is
        # behind them.
        self._gap: list[Tensor | None] = [None] * len(rotations)

    def named_tensors(self) -> dict[str, Tensor]:
        """All that is held, by name."""
        held: dict[str, Tensor | None] = {"offset": self._offset}
        for kind in _BY_LAYER:
            held |= {f"{kind}.{i}": tensor for i, tensor in enumerate(getattr(self, f"_{kind}"))}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def restore(
        self, tensors: Mapping[str, Tensor], prefix: str, devices: Sequence[torch.device]
    ) -> None:
        """Takes over what `named_tensors` gave.

        Args:
            tensors, prefix: each name behind `prefix`.
            devices: by layer, where it is.
        """
        # It goes to where the tokens are in the next step.
        self._set_offset(tensors.get(f"{prefix}offset"))
        for kind in _BY_LAYER:
            found = (
                _moved(tensors.get(f"{prefix}{kind}.{i}"), device)
                for i, device in enumerate(devices)
            )
            setattr(self, f"_{kind}", list(found))

    def _set_offset(self, offset: Tensor | None) -> None:
        self._offset, self._copies = offset, Copies()

    def _offset_on(self, device: torch.device) -> Tensor | None:
        return None if self._offset is None else self._copies.on(self._offset, device)

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        self._set_offset(_selected(self._offset, rows))
        self._home = [_selected(home, rows) for home in self._home]
        self._turn = [_selected(turn, rows) for turn in self._turn]
        self._gap = [_selected(gap, rows) for gap in self._gap]

    @property
    def way(self) -> int:
        """The way in which positions are assigned, for a file to name."""
        return self.sinks

    def tensors(self) -> Iterable[Tensor]:
        """All that is held, for counting bytes."""
        return self.named_tensors().values()

    def keeps_arrivals(self, layer: int) -> bool:
        """Whether slots of a layer keep the position they came with: not here."""
        return False

    def check(self, before: RowNumbers | None, after: RowNumbers, seen: int) -> None:
        """Refuses a mask that hides sinks which were seen: others would stand in their place.

        See `Positions.check`.
        """
        if before is None or before.first is after.first:
            return
        was, now = before.lead(self.sinks), after.lead(self.sinks)
        gone = (was < seen) & ~(was[:, :, None] == now[:, None]).any(-1)
        if bool(gone.any()):
            raise KVPruneError(
                f"attention_mask hides columns {was[gone].tolist()}, which are among the first "
                f"{self.sinks} tokens of rows {gone.any(-1).nonzero().flatten().tolist()}: "
                f"expected a mask that goes on showing these, as positions inside the cache count "
                f"from them. Use positions='original', or reset() and read anew"
            )

    def open(
        self, layers: list[SlotLayer], columns: Tensor, padding: Tensor | None, rows: RowNumbers
    ) -> Tensor:
        """Begins a forward; see `Positions.open`. Padding has position 0."""
        self._anchor(layers, columns, padding, rows)
        assert self._offset is not None
        positions = numbers_of(columns, padding) - self._offset[:, None]
        positions = positions.masked_fill(columns < 0, 0)
        check_reach(positions, self.limit)
        return positions

    def _anchor(
        self, layers: list[SlotLayer], columns: Tensor, padding: Tensor | None, rows: RowNumbers
    ) -> None:
        """Moves all positions back, once they have run further than there are slots."""
        first = rows.first
        offset = self._offset_on(first.device)
        if offset is None or offset is not self._offset:
            self._set_offset(torch.zeros_like(first) if offset is None else offset)
        if not any(self._rotations):
            return
        assert self._offset is not None
        held = max(layer.used for layer in layers)
        newest = (numbers_of(columns, padding) - self._offset[:, None]).amax()
        if held == 0 or int(newest) <= 2 * held + columns.shape[1]:
            return
        each = enumerate(layers)
        lags = [self._lag(i, layer.columns, padding, rows) for i, layer in each]
        shift = torch.stack([lag.to(first.device) for lag in lags]).amin(0)
        if not bool(shift.any()):
            return
        copies = Copies()
        for index, (layer, rotation) in enumerate(zip(layers, self._rotations, strict=True)):
            here = copies.on(shift, layer.columns.device)
            if rotation is not None:
                angles = rotation.angles(-here[:, None, None], layer.keys)
                layer.rewrite_keys(rotation.turned(layer.keys, *angles))
            # The sinks were moved along; the next token's arrival puts them in their place.
            turn = self._turn[index]
            self._turn[index] = (0 if turn is None else turn) - here
        self._set_offset(self._offset + shift)

    def _lag(self, index: int, columns: Tensor, padding: Tensor | None, rows: RowNumbers) -> Tensor:
        """The distance `[B]` of a layer's window from its sinks, beyond that at the beginning."""
        offset, rows = self._offset_on(columns.device), rows.on(columns.device)
        assert offset is not None
        if not columns.shape[-1]:
            return torch.zeros_like(rows.first)
        others = columns[:, 0] >= rows.begin(self.sinks)[:, None]
        oldest = columns[:, 0].masked_fill(~others, _FAR).amin(-1, keepdim=True)
        alone = oldest[:, 0] == _FAR
        number = numbers_of(oldest, _moved(padding, columns.device))[:, 0]
        lag = (number - offset - self.sinks).masked_fill(alone, 0).clamp(min=0)
        gap = self._gap[index]
        gap = torch.full_like(lag, -1) if gap is None else gap
        gap = torch.where((gap < 0) & ~alone, lag, gap)
        self._gap[index] = gap
        return (lag - gap.clamp(min=0)).clamp(min=0)

    def distance_closed(self, at: AtLayer, columns: Tensor) -> Tensor:
        """The distance `[B, 1, S]` that each slot moves on; see `Positions.distance_closed`."""
        lag = self._lag(at.index, columns, at.padding, at.rows)[:, None, None]
        sink = (columns >= 0) & (columns < at.rows.begin(self.sinks)[:, None, None])
        return torch.where(sink, lag, torch.zeros_like(lag))

    def rotation(self, layer: int) -> Rotation | None:
        """How a layer turns its keys and queries; None for one that turns none."""
        return self._rotations[layer]

    def stands_at(self, at: AtLayer, columns: Tensor) -> Tensor:
        """The positions `[B, 1, w]` of tokens of the past; see `Positions.stands_at`.

        A sink stands where its key was moved to, and so do tokens that are gone behind the sinks.
        """
        offset = self._offset_on(columns.device)
        assert offset is not None
        lag = self._lag(at.index, at.slots.columns, at.padding, at.rows)[:, None]
        number = numbers_of(columns, at.padding)
        last_sink = number.clamp(max=self.sinks - 1) + lag
        return torch.maximum(number - offset[:, None], last_sink)[:, None]

    def arrange(self, at: AtLayer) -> Tensor:
        """Puts a layer's sinks in their place; see `Positions.arrange`."""
        rotation = self._rotations[at.index]
        if rotation is not None and self.sinks > 0:
            self._put_sinks(at, rotation)
        return at.slots.keys

    def _put_sinks(self, at: AtLayer, rotation: Rotation) -> None:
        index, slots = at.index, at.slots
        placement = self._placement(at, slots.columns)
        self._take_home(index, slots, placement)
        turn, now = self._lag(index, slots.columns, at.padding, at.rows), self._turn[index]
        if torch.equal(turn, torch.zeros_like(turn) if now is None else now):
            return
        home = self._home[index]
        assert home is not None
        held = placement.held
        keys = rotation.turned(home, *rotation.angles(turn[:, None, None], home))
        if held is None:
            slots.rewrite_keys(keys, placement.place)
        else:
            sink = held.sink[..., None].expand(-1, *keys.shape[1:2], -1, keys.shape[-1])
            slots.rewrite_keys(keys.gather(2, sink), held.index, held.there)
        self._turn[index] = turn.clone()

    def _placement(self, at: AtLayer, columns: Tensor) -> _Placement:
        # Layers mostly hold the same columns in the same order.
        new, notes = at.slot_columns, at.notes
        if "placement" in notes:
            known_new, known, placement = notes["placement"]
            if known_new is new and torch.equal(known, columns):
                return placement
        wanted = at.rows.lead(self.sinks)
        same = columns == wanted[..., None]
        arrived = (wanted[..., None] == new).any(-1)[:, None]
        placement = _Placement(
            place=same.byte().argmax(-1)[:, None],
            arrived=arrived if bool(arrived.any()) else None,
            held=None if bool(same.any(-1).all()) else _held_by(same),
        )
        notes["placement"] = (new, columns, placement)
        return placement

    def _take_home(self, index: int, slots: SlotLayer, placement: _Placement) -> None:
        """Copies the keys of sinks that have just come in."""
        home, arrived = self._home[index], placement.arrived
        # A forward without gradients cuts them off from all that is held; see `SlotLayer.append`.
        if home is not None and home.requires_grad and not torch.is_grad_enabled():
            home = self._home[index] = home.detach()
        if home is not None and arrived is None:
            return
        keys = slots.keys
        place = placement.place[..., None].expand(-1, keys.shape[1], -1, keys.shape[-1])
        came = keys.gather(2, place)
        if home is not None and arrived is not None:
            came = torch.where(arrived[..., None], came, home)
        self._home[index] = came


def _moved(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device)


def _selected(value: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if value is None else value.index_select(0, rows.to(value.device))
