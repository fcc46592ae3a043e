"""One layer's part of a forward: its tokens are stored, attend, are observed, and slots go.

Read `LayerStep.store`, which `Cache.update` calls, and then `LayerStep.attend`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..attention.dispatch import attend, attend_and_observe, scores_for
from ..attention.inputs import Inputs, Scores
from ..attention.looks import blocks, looks, seen_by, views
from ..attention.masks import Mask
from ..errors import KVPruneError
from ..models.devices import without_autocast
from ..policy.moment import Moment
from ..policy.rotary import Rotary
from ..policy.views import SlotView, Statistics
from ..statistics import Block, Queries, Statistic, statistic_dtype
from ..storage.buffers import numbers_at
from ..storage.layer import SlotLayer
from ..storage.rows import RowNumbers
from .step import Step
from .survivors import narrowed, next_to_go, surviving_slots

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


def at_layer(step: Step, index: int, slots: SlotLayer) -> LayerStep:
    """A forward at one of its layers, with the tokens that are left there."""
    known: LayerStep | None = step.layer_steps.get(index)
    if known is None or known.columns is not step.columns:
        device = step.columns.device
        positions = step.align(step.position_ids, device)
        origin = None if step.position_ids is None else step.position_ids[:, 0]
        known = LayerStep(
            step=step,
            index=index,
            slots=slots,
            columns=step.columns,
            slot_columns=step.slot_columns,
            complete=step.complete,
            seen=step.seen + step.count,
            before=step.seen,
            moment=step.moment,
            positions=positions,
            origin=None if origin is None else origin.to(device),
        )
        step.layer_steps[index] = known
    return known


@dataclass(frozen=True, eq=False)
class LayerStep:
    """One forward, or a piece of one, at one layer.

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

    def on(self, device: torch.device) -> LayerStep:
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
        for part in self.slots.parts:
            if part.reads == "hidden":
                with torch.no_grad():
                    numbers = part.numbers(hidden.detach(), self.index)
                columns = self.step.columns_on(hidden.device)[0]
                _check_numbers(part, numbers, columns, hidden)
                self.step.shown.setdefault(self.index, []).append((part, numbers, columns))

    def store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new tokens `[B, Hkv, Q, D]`; returns all that the layer then holds."""
        step, slots = self.step, self.slots
        arrived = None if self.positions is None else self.positions[:, None]
        held = slots.append(
            keys,
            values,
            self.slot_columns,
            seen=self.seen,
            complete=self.complete,
            whole=step.whole,
            in_free_slot=step.count == 1,
            arrived=arrived,
        )
        if step.cache_positions is None:
            return held
        arranged = step.cache_positions.arrange(self)
        step.arranged = slots, arranged
        return arranged, slots.values

    def attend(
        self,
        backend: str,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention at this layer, and what follows from it for the layer's slots.

        Args:
            backend, module: see `attention.dispatch.attend`.
            query: `[B, Hq, Q, D]`.
            key: `[B, Hkv, S, D]`, what `ComposedCache.update` returned or the model made of it.
            value: `[B, Hkv, S, Dv]`, likewise.
            mask: the model's rule.
            arguments: what else transformers passes (scaling, dropout, softcap, ...).

        Returns:
            `[B, Q, Hq, Dv]`, and the probabilities where the backend returns them; see `in_order`.
        """
        if not self.step.one_by_one:
            inputs = self._inputs(query, key, value, mask)
            output, probabilities, queried = self._attend(backend, module, inputs, arguments)
            # Before slots go: they are still those that were attended to.
            probabilities = self.in_order(probabilities)
            self.evict(queried, module)
            return output, probabilities
        # Drafts may be taken back: each is stored when its turn comes, and slots go after each.
        outputs = []
        for new, piece in self._pieces():
            held = piece.store(key[:, :, new], value[:, :, new])
            inputs = piece._inputs(query[:, :, new], *held, mask)
            output, _, queried = piece._attend(backend, module, inputs, arguments)
            piece.evict(queried, module)
            outputs.append(output)
        return torch.cat(outputs, 1), None

    def _inputs(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Inputs:
        return Inputs(
            query,
            key,
            value,
            mask,
            self.columns,
            self.slots.held_columns,
            no_padding=self.complete,
            no_gaps=self.slots.complete,
            count=self.step.count,
            local=self.slots.local,
        )

    def _attend(
        self, backend: str, module: torch.nn.Module, inputs: Inputs, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Queried | None]:
        """Attention, observed where that is wanted.

        Returns:
            the output and probabilities, see `attend`; and what is known of queries, None where
            nothing of them is held.
        """
        slots = self.slots
        reads = {part.reads for part in slots.parts if part.of_attention}
        if not reads and not slots.layer_parts:
            return *attend(backend, module, inputs, **arguments), None
        scores = scores_for(module, inputs, self._heads, **arguments)
        awaited = [p for p in slots.layer_parts if self.step.awaits(p, self.index, self.moment)]
        for part in awaited:
            if part.reads != "rotations":
                with without_autocast(inputs.query.device):
                    slots.observe_queries(part, *self._queries(part, inputs.query.detach()))
        queried = self._queried(inputs, scores) if slots.records or awaited else None
        single = inputs.query.shape[2] == 1
        if "received" not in reads and not ("probabilities" in reads and single):
            # Attention runs as if nothing were observed.
            output, probabilities = attend(backend, module, inputs, **arguments)
            self._observe(inputs, scores, None, None)
            return output, probabilities if not reads else None, queried
        found = attend_and_observe(backend, module, inputs, scores, self._heads, self._dtype)
        self._observe(inputs, scores, found.received, found.probabilities)
        return found.output, None, queried

    def _queries(self, part: Statistic, query: Tensor) -> tuple[Tensor, Tensor]:
        """What a statistic per layer reads of `[B, Hq, Q, D]` queries; see `Statistic.join`."""
        if part.reads == "queries":
            return query, self.columns
        assert self.positions is not None
        rotary, query = self.step.rotations[self.index], query.to(self._dtype)
        unturned = rotary.turned(query, *rotary.angles(-self.positions[:, None], query))
        return unturned, self.rows.numbers_of(self.columns[:, None])[:, 0]

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
        inputs = replace(inputs, query=inputs.query.new_empty(0))
        return Queried(self._look(inputs, scores), scores.scaling, rotary, position)

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

        def look(queries: Queries) -> Tensor | None:
            held = self.slots.records.get(queries)
            if held is not None and queries not in known:
                query, columns = held
                known[queries] = looks(query, columns, inputs, scores, self._heads, self._dtype)
            return known.get(queries)

        return look

    def _observe(
        self, inputs: Inputs, scores: Scores, received: Tensor | None, probabilities: Tensor | None
    ) -> None:
        """Joins what this forward gave to the statistics per slot.

        Args:
            inputs, scores: of attention.
            received: `[B, Hkv, S]`, where some statistic reads it.
            probabilities: `[B, Hkv, G, 1, S]` of a single query, where they are known.
        """
        slots, several = self.slots, inputs.query.shape[2] > 1
        for part in slots.parts:
            if not part.of_attention:
                continue
            if part.reads == "received":
                slots.observe(part, received, several)
            elif part.reads == "views":
                slots.observe(part, views(inputs, self._dtype), several)
            elif probabilities is not None:
                slots.observe(part, Block(probabilities, self.columns, slots.columns))
            else:
                each = blocks(inputs, scores, self._heads, self._dtype, part.newest)
                for block in each:
                    slots.observe(part, block, several)

    def observe(self, probabilities: Tensor) -> None:
        """Adds what slots received to their statistics, for attention that was computed elsewhere.

        Args:
            probabilities: `[B, Hq, Q, S]`.
        """
        slots, several = self.slots, self.columns.shape[1] > 1
        if not slots.parts:
            return
        # Padding does not vote.
        votes = (self.columns >= 0)[:, None, :, None]
        given = (probabilities.detach().to(self._dtype) * votes).unflatten(1, (self._heads, -1))
        for part in slots.parts:
            if not part.of_attention:
                continue
            new: Any = Block(given, self.columns, slots.columns)
            if part.reads == "received":
                new = given.sum((2, 3))
            elif part.reads == "views":
                new = seen_by(self.columns, slots.columns, window=None).to(self._dtype)
            slots.observe(part, new, several)

    def in_order(self, probabilities: Tensor | None) -> Tensor | None:
        """Probabilities as a user who asked for them gets them: in the order of columns.

        Notes which columns these are, for `ComposedCache.attended`. Does nothing where nobody
        asked. Called before slots go.

        Args:
            probabilities: `[B, Hq, Q, S]`, over the slots; None where the backend returns none.

        Returns:
            `[B, Hq, Q, S']`, without slots that are empty in every row and head.
        """
        if self.step.attended is None or probabilities is None:
            return probabilities
        columns, order = self.slots.columns.sort(-1)
        most = int((columns >= 0).sum(-1).amax())
        first = columns.shape[-1] - most
        self.step.attended[self.index] = columns[..., first:]
        heads = probabilities.shape[1] // order.shape[1]
        index = order[..., first:].repeat_interleave(heads, 1)[:, :, None]
        return probabilities.gather(-1, index.expand(*probabilities.shape[:-1], -1))

    def _pieces(self) -> Iterator[tuple[slice, LayerStep]]:
        """The tokens before the drafts together, then each draft by itself, on record."""
        count, drafts = self.columns.shape[1], self.step.drafts
        edges = range(count - drafts, count + 1)
        if edges[0]:
            yield slice(0, edges[0]), self._piece(0, edges[0])
        self.slots.record()
        for start, stop in pairwise(edges):
            yield slice(start, stop), self._piece(start, stop)
            self.slots.record()

    def _piece(self, start: int, stop: int) -> LayerStep:
        columns = self.columns[:, start:stop]
        seen = self.seen - (self.columns.shape[1] - stop)
        # Drafts are never pruned.
        before = self.before if start == 0 else seen - (stop - start)
        lead = stop <= self.columns.shape[1] - self.step.drafts
        piece = replace(
            self,
            columns=columns,
            slot_columns=columns[:, None],
            seen=seen,
            before=before,
            moment=self.moment if lead else self.step.moment_of_draft(seen),
        )
        if self.positions is None:
            return piece
        positions = self.positions[:, start:stop]
        return replace(
            piece, positions=positions, origin=self.origin if start == 0 else positions[:, 0]
        )

    def evict(
        self, queried: Queried | None = None, attention: torch.nn.Module | None = None
    ) -> None:
        """Asks the policies that are due, after attention, and drops what none keeps.

        Args:
            queried: what is known of queries, where something of them is held.
            attention: the layer's attention; None where no model runs.
        """
        at, step, slots = self.on(self.slots.device), self.step, self.slots
        for part, numbers, columns in step.shown.get(self.index, ()):
            columns = columns.to(slots.device)
            if numbers.shape[1] not in (1, slots.heads):
                raise _no_numbers(part, numbers, columns)
            # Of drafts, those whose turn it is.
            here = (columns >= at.before) & (columns < at.seen)
            numbers, columns = numbers.to(slots.device, self._dtype), columns.masked_fill(~here, -1)
            slots.observe(part, numbers_at(slots.columns, numbers, columns))
        new = at.columns.shape[1]
        if step.prunes and at.seen <= step.seen + step.count - step.drafts:
            step.previous = self._for_next_layer(queried, new)
        due, late = step.due_at(self.index, self.moment), step.late_at(self.moment)
        if not due and not late and slots.local is None:
            return
        # Once: below a budget, where there is room for more, each is a view of its own.
        held = slots.columns
        columns = at._in_sight(held)
        full = slots.turnover.policy
        alone = [number for number, _ in due] == [full] and not late
        if step.same_rows and columns is held and alone:
            at._evict_next(due[0][0], queried, attention)
            return
        view = at.view(columns, slots.statistics | slots.records, at.rows, queried, attention)
        left = surviving_slots(due, view, new > 1, step.not_finite)
        if late:
            # Nothing goes yet: what queries are to look at is still what they attended to.
            if left.kept is not None or left.gone is not None:
                kept = _left(view.valid if left.kept is None else left.kept, left.gone)
                view = narrowed(view, kept)
            step.put_off.append((self, view))
        elif columns is not held:
            slots.keep(_left(view.valid if left.kept is None else left.kept, left.gone))
        elif left.gone is not None:
            slots.free(left.gone, left.by)
        elif left.kept is not None:
            slots.keep(left.kept, left.by)
        else:
            # A budget that was full may have grown with the prompt.
            slots.keep_all()

    def _for_next_layer(self, queried: Queried | None, new: int) -> Statistics:
        """What policies before the next layer are shown: this layer's last `new` slots."""
        slots, step = self.slots, self.step
        values = {part: value[..., -new:].clone() for part, value in slots.statistics.items()}
        # Here, since slots may go before the next layer.
        looked: dict[Queries, Tensor] = {}
        for queries in step.queries_before(self.index + 1):
            found = None if queried is None else queried.look(queries)
            if found is not None:
                looked[queries] = found[..., -new:].clone()
        return Statistics(values, lambda queries: looked.get(queries))

    def _evict_next(
        self, number: int, queried: Queried | None, attention: torch.nn.Module | None
    ) -> None:
        """One slot goes in every row and head by the policy that is full: now, or with others'."""
        policy, slots = self.step.evicters[number], self.slots
        # What is held per layer is another in each.
        together = policy.layers_alike and not self.step.one_by_one and not slots.layer_parts
        alike = slots.alike() if together else None
        if alike is not None:
            self.step.due.setdefault(alike, []).append(self)
            return
        held = slots.statistics | slots.records
        view = self.view(slots.columns, held, self.rows, queried, attention)
        gone = next_to_go(policy, view)
        if gone is not None:
            slots.free(gone, number)

    def view(
        self,
        columns: Tensor,
        statistics: Mapping[Statistic, Any],
        rows: RowNumbers,
        queried: Queried | None = None,
        attention: torch.nn.Module | None = None,
    ) -> SlotView:
        """The view of slots with these columns and statistics."""
        keys, arranged = self.slots.keys, self.step.arranged
        if arranged is not None and arranged[0] is self.slots:
            keys = arranged[1]
        return SlotView(
            layer=self.index,
            num_layers=self.step.num_layers,
            columns=columns,
            valid=columns >= 0,
            first=rows.first,
            seen=self.seen,
            moment=self.moment,
            lengths=rows.prompt,
            keys=keys.detach(),
            values=self.slots.values.detach(),
            statistic=Statistics(statistics, None if queried is None else queried.look),
            group=self.step.group,
            begin=rows.begin,
            numbers_of=rows.numbers_of,
            queried=queried,
            attention=attention,
        )

    def _in_sight(self, columns: Tensor) -> Tensor:
        """The same columns, -1 for those that no query behind these can see."""
        local = self.slots.local
        if local is None or self.seen < local.size:
            return columns
        oldest = local.oldest(self.seen, self.rows.first)
        return columns.masked_fill(columns < oldest[:, None, None], -1)


def _check_numbers(part: Statistic, numbers: Any, columns: Tensor, hidden: Tensor) -> None:
    """Refuses what a statistic says of hidden states, where it is not a number for each token.

    Args:
        part: the statistic.
        numbers: what it says.
        columns: `[B, Q]` int64, of the tokens.
        hidden: `[B, Q, C]`.
    """
    fits = isinstance(numbers, Tensor) and numbers.dim() == 3 and numbers.is_floating_point()
    if not fits or (numbers.shape[0], numbers.shape[2]) != columns.shape:
        raise _no_numbers(part, numbers, columns)
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


def _left(kept: Tensor, gone: Tensor | None) -> Tensor:
    """The kept slots `[B, 1|Hkv, S]` without those at `gone` `[B, 1|Hkv, 1]`."""
    if gone is None:
        return kept
    stay = torch.ones_like(kept[:, :1]).repeat(1, gone.shape[1], 1).scatter(-1, gone, False)
    return kept & stay
