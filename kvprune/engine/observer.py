"""What statistics observe of a forward at one layer: queries, attention, hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..attention.dispatch import Observed, attend
from ..attention.inputs import Inputs, Scores
from ..attention.looks import blocks, looks, seen_by, views
from ..errors import KVPruneError
from ..policy.moment import Moment
from ..policy.rotary import Rotary
from ..statistics import Block, Queries, Statistic, statistic_dtype
from ..storage.buffers import numbers_at
from ..storage.layer import SlotLayer
from ..storage.rows import RowNumbers
from ..storage.waiting import Told
from .second_reading import attend_and_vote, vote_by
from .step import Step
from .survivors import meters

Look = Callable[[Queries], Tensor | None]
"""The probabilities that newest queries give to a layer's slots; None where none are held."""


@dataclass(frozen=True, eq=False)
class Queried:
    """What policies that read queries may know of a forward at a layer.

    look: see above.
    scaling, rotary, position: see `SlotView`.
    """

    look: Look
    scaling: float
    rotary: Rotary | None
    position: Tensor | None


@dataclass(frozen=True, eq=False)
class Observer:
    """One forward, or a piece of one, at one layer: where it is, and what statistics observe of it.

    step: the forward.
    index: the layer.
    slots: the layer's slots.
    columns: `[B, Q]` int64, of the queries.
    slot_columns: the same `[B, 1, Q]`.
    complete: it is known that none of these columns is -1.
    seen: columns shown so far, these included.
    before: columns shown so far, without these.
    moment: where these tokens are between prompt and decoding.
    positions: `[B, Q]`, those of the queries, where positions are assigned inside the cache, or
        where somebody reads queries before rotation; else None.
    origin: `[B]`, the position of the first token, which may be pruned by now; likewise.
    """

    step: Step
    index: int
    slots: SlotLayer
    columns: Tensor
    slot_columns: Tensor
    complete: bool
    seen: int
    before: int
    moment: Moment
    positions: Tensor | None = None
    origin: Tensor | None = None

    def on(self, device: torch.device) -> Self:
        """The same where the layer is, if that is not where the step's tokens are."""
        if self.columns.device == device:
            return self
        columns, slot_columns = self.step.columns_on(device)
        positions, origin = (self.step.on(t, device) for t in (self.positions, self.origin))
        return replace(
            self, columns=columns, slot_columns=slot_columns, positions=positions, origin=origin
        )

    @property
    def rows(self) -> RowNumbers:
        """The rows' numbers, where the columns are."""
        return self.step.rows.on(self.columns.device)

    @property
    def padding(self) -> Tensor | None:
        """The step's padding, where the columns are."""
        return self.step.padding_on(self.columns.device)

    @property
    def notes(self) -> dict[str, Any]:
        """The notes of positions inside the cache, until the step is over."""
        return self.step.notes

    def show(self, hidden: Tensor) -> None:
        """Lets statistics say something of the hidden states that enter the layer, `[B, Q, C]`.

        Raises:
            KVPruneError: they do not answer with a number for each token.
        """
        if self.step.repeat is not None:
            # Nothing of these tokens stays.
            if self.step.repeat.part.weighted:
                norms = hidden.detach().to(statistic_dtype(hidden.dtype)).norm(dim=-1)
                # Padding may be all zeros; it gives nothing.
                self.step.norms[self.index] = norms.clamp(min=torch.finfo(norms.dtype).tiny)
            return
        for part in self.slots.parts:
            if part.reads == "hidden":
                with torch.no_grad():
                    numbers = part.numbers(hidden.detach(), self.index)
                columns = self.step.columns_on(hidden.device)[0]
                _check_numbers(part, numbers, columns, hidden)
                self.step.shown.setdefault(self.index, []).append((part, numbers, columns))

    def _observe_shown(self) -> None:
        """Joins what was said of hidden states to the slots of their tokens; see `show`."""
        slots = self.slots
        for part, numbers, columns in self.step.shown.get(self.index, ()):
            columns = columns.to(slots.device)
            if numbers.shape[1] not in (1, slots.heads):
                raise _no_numbers(part, numbers, columns)
            # Of drafts, those whose turn it is.
            here = (columns >= self.before) & (columns < self.seen)
            numbers, columns = numbers.to(slots.device, self._dtype), columns.masked_fill(~here, -1)
            slots.observe(part, numbers_at(slots.columns, numbers, columns))

    def _observe_queries(self, inputs: Inputs, scores: Scores) -> Queried | None:
        """Joins queries to the statistics per layer.

        Returns:
            what is known of queries; None where nothing of them is held, or nobody asks.
        """
        slots, step = self.slots, self.step
        if not slots.layer_parts:
            return None
        awaited = [p for p in slots.layer_parts if step.awaits(p, self.index, self.moment)]
        told = tuple(part for part in awaited if part.reads != "rotations")
        if told:
            self._tell(told, inputs.query.detach())
        asked = step.prunes or step.due_at(self.index, self.moment) or step.late_at(self.moment)
        return self._queried(inputs, scores) if asked and (slots.records or awaited) else None

    def _tell(self, parts: tuple[Statistic, ...], query: Tensor) -> None:
        """Tells statistics per layer of `[B, Hq, Q, D]` queries."""
        step = self.step
        rotary = step.rotations[self.index] if step.rotations else None
        told = Told(parts, query, self.columns, self.positions, rotary, self.rows)
        inside = step.cache_positions
        if inside is None:
            self.slots.observe_queries(told)
            return
        as_handed = tuple(part for part in parts if part.reads == "queries")
        others = tuple(part for part in parts if part.reads != "queries")
        if as_handed:
            # In the dtype of statistics: turning rounds, and they are turned again when asked.
            unturned = inside.unturned(self, query.to(self._dtype))
            self.slots.observe_queries(replace(told, parts=as_handed, queries=unturned))
        if others:
            self.slots.observe_queries(replace(told, parts=others))

    def _queried(self, inputs: Inputs, scores: Scores) -> Queried:
        """What is known of queries, for policies."""
        rotary = position = None
        if self.positions is not None and self.step.rotations:
            rotary = self.step.rotations[self.index]
            # A row that has no token here: as many as it has, which is where most models have it.
            last = torch.full_like(self.rows.first, self.seen - 1)
            number = self.rows.numbers_of(last[:, None, None])[:, 0, 0]
            newest = self.positions.masked_fill(self.columns < 0, -1).amax(-1)
            position = torch.where(newest < 0, number, newest)
        # Looks may be asked for after the last layer; nobody wants this forward's queries then.
        nothing = inputs.query.new_empty(0)
        inputs = replace(inputs, query=nothing)
        if self.step.late_at(self.moment) and self._as_stored:
            # Nor should what was read back of all layers wait for it.
            codes = self.slots.coded()
            if codes is not None:
                shape = codes[0].shape_alone(inputs.key.dtype)
                inputs = replace(inputs, key=shape, value=nothing, coded=codes)
            elif inputs.pieces is not None:
                inputs = replace(inputs, pieces=self.slots.pieces(codes=True))
        return Queried(self._look(inputs, scores), scores.scaling, rotary, position)

    @property
    def _as_stored(self) -> bool:
        """Whether attention may be handed keys and values as they are stored."""
        return self.slots.direct and self.step.cache_positions is None

    @property
    def _heads(self) -> int:
        """The key/value heads that are stored."""
        return self.slots.heads

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of statistics."""
        return statistic_dtype(self.slots.dtype)

    def _look(self, inputs: Inputs, scores: Scores) -> Look:
        """What newest queries give to the slots, each computed once."""
        known: dict[Queries, Tensor] = {}
        inside = self.step.cache_positions

        def look(queries: Queries) -> Tensor | None:
            held = self.slots.records.get(queries)
            if held is not None and queries not in known:
                query, columns = held
                if inside is not None:
                    query = inside.turned(self, query, columns)
                known[queries] = looks(query, columns, inputs, scores, self._heads, self._dtype)
            return known.get(queries)

        return look

    def _observe(self, inputs: Inputs, scores: Scores, observed: Observed | None) -> None:
        """Joins what this forward gave to the statistics per slot.

        Args:
            inputs, scores: of attention.
            observed: attention, if it was observed: where some statistic reads what is received,
                or the probabilities of a single query.
        """
        slots, several = self.slots, inputs.query.shape[2] > 1
        probabilities = None if observed is None else observed.probabilities
        for part in slots.parts:
            if not part.of_attention:
                continue
            if part.reads == "received":
                assert observed is not None
                slots.observe(part, observed.received, several)
            elif part.reads == "views":
                slots.observe(part, views(inputs, self._dtype), several)
            elif probabilities is not None:
                slots.observe(part, self._block(probabilities[:, :, :, None]))
            else:
                each = blocks(inputs, scores, self._heads, self._dtype, part.newest)
                for block in each:
                    numbered = replace(block, numbers_of=self.rows.numbers_of)
                    slots.observe(part, numbered, several)

    def _block(self, probabilities: Tensor) -> Block:
        """All queries of the forward, `[B, Hkv, G, Q, S]`."""
        return Block(
            probabilities,
            self.columns,
            self.slots.columns,
            self.complete,
            self.rows.numbers_of,
        )

    def _attend_again(
        self, backend: str, module: torch.nn.Module, inputs: Inputs, arguments: dict[str, Any]
    ) -> Tensor:
        """Attention of a second reading, whose queries vote for slots where that is wanted."""
        repeat, slots = self.step.repeat, self.slots
        if repeat is None or repeat.part not in slots.parts:
            return attend(backend, module, inputs, **arguments)[0]
        how = self._norms, self._dtype, arguments
        return attend_and_vote(backend, module, repeat, slots, self.rows, inputs, *how)

    @property
    def _norms(self) -> Tensor | None:
        """The norms of the hidden states that entered the layer, where they are wanted."""
        norms = self.step.norms.get(self.index)
        return None if norms is None else norms.to(self.slots.device, self._dtype)

    def observe(self, probabilities: Tensor, attention: torch.nn.Module) -> None:
        """Adds what slots received to their statistics, for attention that was computed elsewhere.

        Args:
            probabilities: `[B, Hq, Q, S]`.
            attention: the layer's.
        """
        slots, several = self.slots, self.columns.shape[1] > 1
        repeat = self.step.repeat
        observed = any(part.of_attention for part in slots.parts)
        if not (observed if repeat is None else repeat.part in slots.parts):
            return
        # Padding does not vote.
        votes = (self.columns >= 0)[:, None, :, None]
        given = (probabilities.detach().to(self._dtype) * votes).unflatten(1, (self._heads, -1))
        if repeat is not None:
            norms = self._norms
            with meters():
                vote_by(repeat, slots, self.rows, given, self.columns, norms, attention)
            return
        for part in slots.parts:
            if not part.of_attention:
                continue
            new: Any = self._block(given)
            if part.reads == "received":
                new = given.sum((2, 3))
            elif part.reads == "views":
                new = seen_by(self.columns, slots.columns, window=None).to(self._dtype)
            slots.observe(part, new, several)


def _check_numbers(part: Statistic, numbers: Any, columns: Tensor, hidden: Tensor) -> None:
    """Refuses what a statistic says of hidden states, where it is not a number for each token.

    NaN is looked for in forwards of several tokens.

    Args:
        part: the statistic.
        numbers: what it says.
        columns: `[B, Q]` int64, of the tokens.
        hidden: `[B, Q, C]`.
    """
    fits = isinstance(numbers, Tensor) and numbers.dim() == 3 and numbers.is_floating_point()
    if not fits or (numbers.shape[0], numbers.shape[2]) != columns.shape:
        raise _no_numbers(part, numbers, columns)
    if columns.shape[1] == 1:
        # In decoding nothing waits for the device.
        return
    # A token whose state is not finite has none; other rows do not notice.
    judged = (columns >= 0) & hidden.isfinite().all(-1)
    wrong = (numbers.isnan() & judged[:, None]).flatten(1).any(-1)
    if bool(wrong.any()):
        raise KVPruneError(
            f"{part!r}: expected numbers that can be compared, got NaN in rows "
            f"{wrong.nonzero().flatten().tolist()}"
        )


def _no_numbers(part: Statistic, numbers: Any, columns: Tensor) -> KVPruneError:
    got = type(numbers).__name__
    if isinstance(numbers, Tensor):
        got = f"{numbers.dtype} of shape {list(numbers.shape)}"
    rows, count = columns.shape
    return KVPruneError(
        f"{part!r}: expected floats of shape [{rows}, 1 or the key/value heads, {count}], one for "
        f"each token and head, got {got}"
    )
