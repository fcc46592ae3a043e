"""What each forward evicted, for whoever debugs a policy: `ComposedCache.on_evict`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.step import Step
from .state import CacheState


@dataclass(frozen=True, eq=False)
class Arrived:
    """The tokens of a forward, as their columns `[B, Q]`, and by layer those that entered it."""

    tokens: Tensor
    entered: Mapping[int, Tensor]

    @classmethod
    def of(cls, step: Step) -> Arrived:
        """What a forward brought, noted at its end."""
        return cls(step.tokens, {i: layer.columns for i, layer in step.layer_steps.items()})


@dataclass(frozen=True, eq=False)
class Eviction:
    """What a layer gave up in a forward, or behind a prompt that was read twice.

    Attributes:
        seen: the columns that the cache had been shown when they went.
        layer: the decoder layer.
        columns: int64 `[B, 1|Hkv, n]`, sorted, -1 first where a row or head gave up fewer; of what
            the layer held before, and of the forward's own tokens. The head axis is 1 while all
            heads hold the same.
        pruned: int64 `[B, m]`, likewise: the forward's tokens that did not enter the layer.
    """

    seen: int
    layer: int
    columns: Tensor
    pruned: Tensor

    def __repr__(self) -> str:
        gone, pruned = int((self.columns >= 0).sum()), int((self.pruned >= 0).sum())
        return f"Eviction(seen={self.seen}, layer={self.layer}: {gone} slots, {pruned} pruned)"


class Watch:
    """What `on_evict` has still to be told: what layers held before the last forward, and since."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}
        self._arrived: Arrived | None = None
        self._untold = False

    def begin(self, state: CacheState) -> None:
        """A forward begins."""
        self._held = held_columns(state)

    def arrived(self, step: Step) -> None:
        """It has ended."""
        self._arrived, self._untold = Arrived.of(step), True

    def read_again(self) -> None:
        """A second reading has ended, and what waited for it was evicted."""
        self._untold = True

    def untold(self, state: CacheState) -> list[Eviction]:
        """What went since; each eviction is returned once."""
        if not self._untold:
            return []
        found = list(evictions(self._held, state, self._arrived))
        self._held, self._arrived, self._untold = held_columns(state), None, False
        return found


def held_columns(state: CacheState) -> dict[int, Tensor]:
    """By layer, the columns `[B, 1|Hkv, S]` of its slots, -1 where one is empty."""
    layers = state.slot_layers()
    return {index: layer.columns.clone() for index, layer in layers if layer.is_initialized}


def evictions(
    before: Mapping[int, Tensor], state: CacheState, arrived: Arrived | None
) -> Iterator[Eviction]:
    """What layers hold no more; nothing is said of a layer that gave up nothing.

    Args:
        before: what `held_columns` said, before the forward.
        state: what is held behind it.
        arrived: the forward; None where there was none. What was taken back of it is left out.
    """
    for index, now in held_columns(state).items():
        none = now.new_full((now.shape[0], 1, 0), -1)
        was, entered, shown = before.get(index, none), none, none
        if arrived is not None:
            shown = arrived.tokens[:, None].to(now.device)
            entered = arrived.entered.get(index, arrived.tokens)[:, None].to(now.device)
        heads = max(each.shape[1] for each in (was, now))
        there, here, came, all_came = (
            _marked(each, state.seen).expand(-1, count, -1)
            for each, count in ((was, heads), (now, heads), (entered, heads), (shown, 1))
        )
        gone, pruned = (there | came) & ~here, all_came & ~came[:, :1]
        if bool(gone.any()) or bool(pruned.any()):
            yield Eviction(state.seen, index, _columns(gone), _columns(pruned)[:, 0])


def _marked(columns: Tensor, count: int) -> Tensor:
    """`[B, H, count]` bool, where the columns `[B, H, S]` are."""
    marks = torch.zeros(*columns.shape[:2], count + 1, dtype=torch.bool, device=columns.device)
    # What is empty, or was taken back, goes to the last place, which is cut off.
    marks.scatter_(2, columns.masked_fill((columns < 0) | (columns > count), count), True)
    return marks[..., :count]


def _columns(marks: Tensor) -> Tensor:
    """The places of marks `[B, H, count]`, sorted, -1 first."""
    places = torch.arange(marks.shape[-1], device=marks.device).expand_as(marks)
    found = places.masked_fill(~marks, -1).sort(-1).values
    most = int(marks.sum(-1).amax()) if marks.numel() else 0
    return found[..., found.shape[-1] - most :]
