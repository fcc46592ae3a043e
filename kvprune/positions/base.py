"""Positions inside the cache: what the engine asks of them, and what they ask of a forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..storage.layer import SlotLayer
from ..storage.rows import RowNumbers
from .rotary import Rotation


class AtLayer(Protocol):
    """A forward, or a piece of one, at one layer, as far as positions read it.

    index: the layer.
    slots: its slots.
    slot_columns: `[B, 1, Q]` int64, the columns of the forward's tokens; one object for all layers.
    before: columns shown before these tokens.
    positions: `[B, Q]`, those of the forward's tokens.
    origin: `[B]`, the position of the first token, which may be pruned by now.
    rows: the rows' numbers.
    padding: `[B, n]` bool, which columns are padding; those behind are not. None for none.
    notes: what positions remember until the forward is over.
    """

    @property
    def index(self) -> int: ...
    @property
    def slots(self) -> SlotLayer: ...
    @property
    def slot_columns(self) -> Tensor: ...
    @property
    def before(self) -> int: ...
    @property
    def positions(self) -> Tensor | None: ...
    @property
    def origin(self) -> Tensor | None: ...
    @property
    def rows(self) -> RowNumbers: ...
    @property
    def padding(self) -> Tensor | None: ...
    @property
    def notes(self) -> dict[str, Any]: ...


class Positions(ABC):
    """The positions that one cache assigns to its slots."""

    @property
    @abstractmethod
    def way(self) -> Any:
        """The way in which positions are assigned, for a file to name."""

    @abstractmethod
    def open(
        self, layers: list[SlotLayer], columns: Tensor, padding: Tensor | None, rows: RowNumbers
    ) -> Tensor:
        """Begins a forward; the positions `[B, Q]` of its tokens.

        Args:
            layers: of the cache.
            columns: `[B, Q]`, -1 for padding.
            padding: `[B, n]`, which columns are; those behind are not. None for none.
            rows: the rows' numbers.

        Raises:
            KVPruneError: they run to where the model changes its frequencies.
        """

    def to_hold(self, at: AtLayer, keys: Tensor) -> Tensor:
        """New keys `[B, Hkv, Q, D]` as the layer is to hold them."""
        return keys

    @abstractmethod
    def arrange(self, at: AtLayer) -> Tensor:
        """The keys of all slots `[B, Hkv, S, D]` at their positions, once new tokens are stored."""

    def unturned(self, at: AtLayer, vectors: Tensor) -> Tensor:
        """Queries or keys `[B, H, Q, D]` of a forward as if their tokens stood at position 0.

        So queries are held for later forwards, in which their tokens stand elsewhere.
        """
        rotation = self.rotation(at.index)
        if rotation is None:
            return vectors
        assert at.positions is not None
        return rotation.turned(vectors, *rotation.angles(-at.positions[:, None], vectors))

    def turned(self, at: AtLayer, queries: Tensor, columns: Tensor) -> Tensor:
        """Queries that were held, where their tokens now stand.

        Args:
            at: a forward at a layer, once its tokens are stored.
            queries: `[B, Hq, w, D]`, as `unturned` returns them.
            columns: `[B, w]` int64, -1 for none.
        """
        rotation = self.rotation(at.index)
        if rotation is None:
            return queries
        positions = self.stands_at(at, columns)
        each = queries.shape[1] // positions.shape[1]
        angles = rotation.angles(positions, queries)
        return rotation.turned(queries, *(part.repeat_interleave(each, 1) for part in angles))

    @abstractmethod
    def rotation(self, layer: int) -> Rotation | None:
        """How a layer turns its keys and queries; None for one that turns none."""

    @abstractmethod
    def stands_at(self, at: AtLayer, columns: Tensor) -> Tensor:
        """The positions `[B, 1|Hkv, w]` at which tokens of the past stand now.

        Args:
            at: a forward at a layer, once its tokens are stored.
            columns: `[B, w]` int64, of tokens whose slots may be gone; any number for -1.
        """

    @abstractmethod
    def distance_closed(self, at: AtLayer, columns: Tensor) -> Tensor:
        """The distance `[B, 1|H, S]` that each slot moves on, for a bias by position (ALiBi).

        Args:
            at: a forward at a layer, before its tokens are stored.
            columns: `[B, 1|H, S]`, of all slots that are attended to.
        """

    @abstractmethod
    def keeps_arrivals(self, layer: int) -> bool:
        """Whether slots of a layer keep the position they came with."""

    @abstractmethod
    def check(self, before: RowNumbers | None, after: RowNumbers, seen: int) -> None:
        """Refuses a mask that hides tokens from which positions are counted.

        Args:
            before: the rows' numbers before a forward.
            after: the rows' numbers after it.
            seen: columns before it.

        Raises:
            KVPruneError: see above.
        """

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""

    @abstractmethod
    def tensors(self) -> Iterable[Tensor]:
        """All that is held, for counting bytes."""

    @abstractmethod
    def named_tensors(self) -> dict[str, Tensor]:
        """All that a file has to hold, by name."""

    @abstractmethod
    def restore(
        self, tensors: Mapping[str, Tensor], prefix: str, devices: Sequence[torch.device]
    ) -> None:
        """Takes over what `named_tensors` gave.

        Args:
            tensors: by name.
            prefix: what stands before each name.
            devices: by layer, where it is.
        """
