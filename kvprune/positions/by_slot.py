"""Positions inside the cache where what is left has gaps, by row and head, as H2O leaves it.

A slot's position is its place among the slots that its row and key/value head hold: the newest
held slot sits right before the first token of the forward, the one before it one position
earlier, and so on. Tokens of one forward keep the distances that they have in the text. So
gaps close, those that pruning left too, and no position ever reaches the most slots that a
layer holds plus the tokens of a forward, however long the stream.

Keys stay as they came, turned by the position they came with, which the slot keeps beside
them. A layer that has lost something turns a copy of all its keys in each forward, from where
they came to where they now belong: no error adds up, and the cost is O(S D) a layer and step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..storage.layer import SlotLayer
from ..storage.rows import RowNumbers
from .base import AtLayer, Positions
from .rotary import Rotation, check_reach

_FAR = torch.iinfo(torch.int64).max

TABLE = 1 << 12
"""The number of positions up to which cosines and sines are looked up, not computed anew."""


class SlotPositions(Positions):
    """Assigns the positions of one cache's rows.

    Args:
        rotations: by layer; see `rotations_of`.
        limit: the position from which on the model changes its frequencies; None if never.
        as_first: whether layers hold all keys as if their tokens stood at position 0. A store that
            rounds then rounds a token alike, wherever it came.
    """

    def __init__(
        self, rotations: list[Rotation | None], limit: int | None, as_first: bool = False
    ) -> None:
        self._rotations, self.limit, self._as_first = rotations, limit, as_first
        # No position so far, nor a difference of two, was as large.
        self._reach = 0
        # Of the layers that turn alike the first; by it, angles of -n, ..., n positions.
        owners: dict[int, int] = {}
        each = enumerate(rotations)
        self._alike = [owners.setdefault(id(r and r.frequencies), i) for i, r in each]
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def way(self) -> str:
        """The way in which positions are assigned, for a file to name."""
        return "places"

    def named_tensors(self) -> dict[str, Tensor]:
        """All that a file has to hold, by name."""
        return {"reach": torch.tensor([self._reach])}

    def restore(
        self, tensors: Mapping[str, Tensor], prefix: str, devices: Sequence[torch.device]
    ) -> None:
        """Takes over what `named_tensors` gave, each name behind `prefix`."""
        self._reach = int(tensors[f"{prefix}reach"])

    def tensors(self) -> Iterable[Tensor]:
        """All that is held, for counting bytes."""
        return (part for table in self._tables.values() for part in table)

    def select_rows(self, rows: Tensor) -> None:
        """Nothing here is of a row: what is moves with its slots."""

    def keeps_arrivals(self, layer: int) -> bool:
        """Whether slots of a layer keep the position they came with."""
        return self._rotations[layer] is not None

    def check(self, before: RowNumbers | None, after: RowNumbers, seen: int) -> None:
        """A mask may hide whatever it likes here: gaps close."""

    def open(
        self, layers: list[SlotLayer], columns: Tensor, padding: Tensor | None, rows: RowNumbers
    ) -> Tensor:
        """Begins a forward; see `Positions.open`.

        Padding has the position of the token before it, or of the row's first token here.
        """
        held = [layer for layer in layers if layer.is_initialized]
        place = ((columns >= 0).cumsum(-1) - 1).clamp(min=0)
        positions = _most_held(held, padding, rows.first)[:, None] + place
        check_reach(positions, self.limit)
        most = max((layer.used for layer in held), default=0)
        self._reach = max(self._reach, most + columns.shape[1])
        return positions

    def to_hold(self, at: AtLayer, keys: Tensor) -> Tensor:
        """New keys `[B, Hkv, Q, D]`: as they came, or as if they stood at position 0."""
        return self.unturned(at, keys) if self._as_first else keys

    def arrange(self, at: AtLayer) -> Tensor:
        """The keys of all slots `[B, Hkv, S, D]` at their positions, once new tokens are stored.

        Args:
            at: a forward at a layer.
        """
        slots, rotation = at.slots, self._rotations[at.index]
        as_they_came = not self._as_first and (slots.whole or at.before == 0)
        if rotation is None or as_they_came:
            return slots.keys
        place, held = _places(at, slots.columns)
        assert at.origin is not None
        by = torch.where(held, at.origin[:, None, None] + place, slots.arrived)
        if not self._as_first:
            by = by - slots.arrived
        # An empty slot has any number.
        by = by.masked_fill(slots.columns < 0, 0)
        keys = slots.keys
        return rotation.turned(keys, *self._angles(at.index, rotation, by, keys))

    def rotation(self, layer: int) -> Rotation | None:
        """How a layer turns its keys and queries; None for one that turns none."""
        return self._rotations[layer]

    def stands_at(self, at: AtLayer, columns: Tensor) -> Tensor:
        """The positions `[B, 1|Hkv, w]` at which tokens of the past stand now.

        A token whose slot is gone stands where the newest slot before it does.

        Args:
            at: a forward at a layer, once its tokens are stored.
            columns: `[B, w]` int64, of tokens whose slots may be gone; any number for -1.
        """
        assert at.origin is not None
        slots, padding = at.slots.columns, at.padding
        held = slots.masked_fill((slots < 0) | (slots >= at.before), _FAR).sort(-1).values
        wanted = columns[:, None].expand(-1, slots.shape[1], -1).contiguous()
        place = torch.searchsorted(held, wanted, right=True) - 1
        place = place - (held < _FAR).sum(-1, keepdim=True)
        # Tokens of this forward keep their distances.
        hidden = 0 if padding is None else padding[:, : at.before].sum(-1)[:, None]
        ahead = (numbers_of(columns, padding) - (at.before - hidden))[:, None]
        new = (columns >= at.before)[:, None]
        return at.origin[:, None, None] + torch.where(new, ahead, place)

    def _angles(
        self, layer: int, rotation: Rotation, by: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`Rotation.angles`, looked up where positions have not run far."""
        if self._reach > TABLE:
            self._tables.clear()
            return rotation.angles(by, keys)
        owner = (self._alike[layer], keys.device)
        if owner not in self._tables or len(self._tables[owner][0]) < 2 * self._reach:
            size = 1 << (self._reach - 1).bit_length()
            span = torch.arange(-size, size + 1, device=keys.device)
            self._tables[owner] = rotation.angles(span, keys)
        cosine, sine = self._tables[owner]
        index = by + len(cosine) // 2
        return torch.nn.functional.embedding(index, cosine), torch.nn.functional.embedding(
            index, sine
        )

    def distance_closed(self, at: AtLayer, columns: Tensor) -> Tensor:
        """The distance `[B, 1|H, S]` that each slot moves on, for a bias by position (ALiBi).

        Args:
            at: a forward at a layer, before its tokens are stored.
            columns: `[B, 1|H, S]`, of all slots that are attended to.
        """
        padding = at.padding
        place, held = _places(at, columns)
        number = numbers_of(columns.flatten(1), padding).view_as(columns)
        hidden = 0 if padding is None else padding[:, : at.before].sum(-1)[:, None, None]
        return (place - (number - (at.before - hidden))).masked_fill(~held, 0)


def _most_held(layers: list[SlotLayer], padding: Tensor | None, like: Tensor) -> Tensor:
    """The most slots that a layer and head hold of each row, `[B]` int64.

    Not those that a forward's mask is the first to hide, which go before its layers run.
    """
    # A layer that has lost nothing holds as many as any.
    layers = next(([layer] for layer in layers if layer.whole), layers)
    most = torch.zeros_like(like)
    for layer in layers:
        columns = layer.columns.to(like.device)
        most = most.maximum(_shown(columns, padding).sum(-1).amax(-1))
    return most


def _shown(columns: Tensor, padding: Tensor | None) -> Tensor:
    """True for `columns` `[B, H, S]` that there are and that are no padding."""
    if padding is None:
        return columns >= 0
    size = padding.shape[1]
    at = columns.clamp(0, size - 1).flatten(1)
    hidden = padding.gather(1, at).view_as(columns) & (columns < size)
    return (columns >= 0) & ~hidden


def _places(at: AtLayer, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The places of slots that were held before a forward, or a piece of one.

    Args:
        at: which, at which layer.
        columns: `[B, 1|H, S]`, of all slots that are attended to.

    Returns:
        their positions `[B, 1|H, S]`, counted from the first new token's: -1 for the newest;
        and which slots these are, bool.
    """
    size = columns.shape[-1]
    order, places = columns.argsort(-1), torch.arange(size, device=columns.device)
    rank = torch.empty_like(order).scatter_(-1, order, places.expand_as(order))
    new = columns >= at.before
    return rank - size + new.sum(-1, keepdim=True), (columns >= 0) & ~new


def numbers_of(columns: Tensor, padding: Tensor | None) -> Tensor:
    """The number of valid tokens of its row before each of `columns` `[B, n]`.

    Args:
        columns: -1 where there is none.
        padding: `[B, columns so far]`; None for none.
    """
    if padding is None:
        return columns
    before = padding.long().cumsum(-1)
    return columns - before.gather(-1, columns.clamp(0, padding.shape[1] - 1))
