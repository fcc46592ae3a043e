"""One layer's part of a forward: its tokens are stored, attend, are observed, and slots go.

Read `LayerStep.store`, which `Cache.update` calls, and then `LayerStep.attend`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import nan
from typing import Any

import torch
from torch import Tensor

from ..attention.coded import Coded
from ..attention.constants import constant
from ..attention.dispatch import attend, attend_and_observe, scores_for
from ..attention.inputs import Inputs
from ..attention.lanes import Lanes
from ..attention.masks import Mask
from ..policy.stored import Stored
from ..policy.views import SlotView, Statistics
from ..statistics import Queries, Statistic
from ..storage.layer import SlotLayer
from ..storage.rows import RowNumbers
from .observer import Observer, Queried
from .step import Step
from .survivors import narrowed, next_to_go, surviving_slots


def at_layer(step: Step, index: int, slots: SlotLayer) -> LayerStep:
    """A forward at one of its layers, with the tokens that are left there."""
    known: LayerStep | None = step.layer_steps.get(index)
    if known is None or known.columns is not step.columns:
        device = step.columns.device
        positions = step.align(step.position_ids, device)
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
            origin=None if step.origin is None else step.origin.to(device),
        )
        step.layer_steps[index] = known
    return known


@dataclass(frozen=True, eq=False)
class LayerStep(Observer):
    """One forward, or a piece of one, at one layer: its tokens are stored, attend, and slots go."""

    def store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new tokens `[B, Hkv, Q, D]`; returns all that the layer then holds."""
        step, slots = self.step, self.slots
        arrived = None
        if slots.arrivals:
            assert self.positions is not None
            arrived = self.positions[:, None]
        if step.cache_positions is not None:
            keys = step.cache_positions.to_hold(self, keys)
        slots.append(
            keys,
            values,
            self.slot_columns,
            seen=self.seen,
            complete=self.complete,
            whole=step.whole,
            in_free_slot=step.count == 1 and step.repeat is None,
            arrived=arrived,
        )
        if step.cache_positions is not None:
            arranged = step.cache_positions.arrange(self)
            step.arranged = slots, arranged
            return arranged, slots.values
        by_codes = keys.shape[2] == 1 and slots.holds_codes
        if self._as_stored and (by_codes or slots.lanes is not None):
            # Shapes without numbers: attention reads what is held.
            nothing = constant(_nothing, keys.dtype, keys.device)
            shape = (*keys.shape[:2], slots.used)
            return nothing.expand(*shape, keys.shape[3]), nothing.expand(*shape, values.shape[3])
        return slots.turned() if self._turned else (slots.keys, slots.values)

    def _coded(self, new: Tensor) -> tuple[Coded, Coded] | None:
        """Keys and values as codes, where a single query `[B, H, 1, D]` attends to these."""
        return self.slots.coded() if new.shape[2] == 1 and self._as_stored else None

    @property
    def _turned(self) -> bool:
        """Whether attention is handed keys and values as a store turned them; see `hadamard`."""
        return self.slots.store.turns and self._as_stored

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
            inputs = self._inputs(query, key, value, mask, backend, arguments)
            output, probabilities, queried = self._attend(backend, module, inputs, arguments)
            # Before slots are dropped: the probabilities belong to the slots that attention saw.
            probabilities = self.in_order(probabilities)
            self.evict(queried, module)
            return output, probabilities
        # Drafts may be taken back: each is stored when its turn comes, and slots go after each.
        outputs = []
        for new, piece in self._pieces():
            held = piece.store(key[:, :, new], value[:, :, new])
            inputs = piece._inputs(query[:, :, new], *held, mask, backend, arguments)
            output, _, queried = piece._attend(backend, module, inputs, arguments)
            piece.evict(queried, module)
            outputs.append(output)
        return torch.cat(outputs, 1), None

    def _inputs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        backend: str,
        arguments: Mapping[str, Any],
    ) -> Inputs:
        slots, lanes, pieces = self.slots, self.slots.lanes, None
        if lanes is not None and self._as_stored:
            if _goes_by_piece(lanes, backend, mask, arguments):
                pieces = slots.pieces(codes=query.shape[2] == 1)
            else:
                key, value = slots.turned() if self._turned else (slots.keys, slots.values)
        return Inputs(
            query,
            key,
            value,
            mask,
            self.columns,
            # Nobody reads it where there are pieces.
            self.slot_columns if pieces is not None else slots.held_columns,
            no_padding=self.complete,
            no_gaps=slots.complete,
            count=self.step.count,
            local=slots.local,
            turned=self._turned,
            coded=self._coded(query),
            pieces=pieces,
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
        if self.step.repeat is not None:
            return self._attend_again(backend, module, inputs, arguments), None, None
        reads = {part.reads for part in slots.parts if part.of_attention}
        if not reads and not slots.layer_parts:
            return *attend(backend, module, inputs, **arguments), None
        scores = scores_for(module, inputs, self._heads, **arguments)
        queried = self._observe_queries(inputs, scores)
        single = inputs.query.shape[2] == 1
        if "received" not in reads and not ("probabilities" in reads and single):
            # Attention runs as if nothing were observed.
            output, probabilities = attend(backend, module, inputs, **arguments)
            self._observe(inputs, scores, None)
            return output, probabilities if not reads else None, queried
        found = attend_and_observe(backend, module, inputs, scores, self._heads, self._dtype)
        self._observe(inputs, scores, found)
        return found.output, None, queried

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
        """One piece of all tokens before the drafts, then one for each draft.

        What the layer holds is recorded before the first draft, and after each.
        """
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
        """Asks the policies that are due, after attention, and drops what not all of them keep.

        Args:
            queried: what is known of queries, where something of them is held.
            attention: the layer's attention; None where no model runs.
        """
        at, step, slots = self.on(self.slots.device), self.step, self.slots
        if step.repeat is not None:
            return
        at._observe_shown()
        new = at.columns.shape[1]
        if step.prunes and at.seen <= step.seen + step.count - step.drafts:
            step.previous = self._for_next_layer(queried, new)
        due, late = step.due_at(self.index, self.moment), step.late_at(self.moment)
        if not due and not late:
            at._drop_out_of_sight()
            return
        # Read once: with room for more slots each read is a new view, and `is` compares below.
        held = slots.columns
        columns = at._in_sight(held)
        full = slots.full_for
        alone = [number for number, _ in due] == [full] and not late
        if step.same_rows and columns is held and alone:
            at._evict_next(due[0][0], queried, attention)
            return
        view = at.view(columns, slots.statistics | slots.records, at.rows, queried, attention)
        left = surviving_slots(due, view, new > 1, step.not_finite)
        if late:
            # Nothing is dropped yet: a policy asked later may look at the slots that attention saw.
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
            # The prompt may have grown, and budgets with it: no policy counts as full any more.
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
        """Drops one slot in every row and head, by the policy that is full.

        That is now, or after the last layer, for several layers at once.
        """
        policy, slots = self.step.evicters[number], self.slots
        # Statistics per layer differ between layers: such a layer evicts alone.
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
        slots, arranged = self.slots, self.step.arranged

        def read(name: str) -> Tensor:
            # Keys as attention had them.
            if name == "keys" and arranged is not None and arranged[0] is slots:
                return arranged[1]
            found: Tensor = getattr(slots, name)
            return found

        return SlotView(
            layer=self.index,
            num_layers=self.step.num_layers,
            columns=columns,
            valid=columns >= 0,
            first=rows.first,
            seen=self.seen,
            moment=self.moment,
            lengths=rows.prompt,
            stored=Stored(slots.heads, read, self.step.read_last if slots.made_anew else None),
            statistic=Statistics(statistics, None if queried is None else queried.look),
            group=self.step.group,
            heads_part=self.step.heads_part,
            begin=rows.begin,
            numbers_of=rows.numbers_of,
            queried=queried,
            window=None if slots.local is None else slots.local.size,
            attention=attention,
        )

    def _drop_out_of_sight(self) -> None:
        """Where no policy is asked, drops what no later query can see."""
        slots = self.slots
        if slots.local is None:
            return
        held = slots.columns
        columns = self._in_sight(held)
        if columns is held:
            slots.keep_all()
        else:
            slots.keep(columns >= 0)

    def _in_sight(self, columns: Tensor) -> Tensor:
        """The same columns, -1 for those that no later query of a local layer can see."""
        local = self.slots.local
        if local is None or self.seen < local.size:
            return columns
        oldest = local.oldest(self.seen, self.rows.first)
        return columns.masked_fill(columns < oldest[:, None, None], -1)


def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN, which fills keys and values that have a shape but must not be read."""
    return torch.full((), nan, dtype=dtype, device=device)


def _goes_by_piece(lanes: Lanes, backend: str, mask: Mask, arguments: Mapping[str, Any]) -> bool:
    """Whether attention can go to one rectangle after the other.

    Not where it returns probabilities of all slots, nor where heads are told apart by number.
    """
    if backend == "eager" or arguments.get("position_bias") is not None:
        return False
    return not lanes.by_head or (mask.same_for_heads and arguments.get("s_aux") is None)


def _left(kept: Tensor, gone: Tensor | None) -> Tensor:
    """The kept slots `[B, 1|Hkv, S]` without those at `gone` `[B, 1|Hkv, 1]`."""
    if gone is None:
        return kept
    stay = torch.ones_like(kept[:, :1]).repeat(1, gone.shape[1], 1).scatter(-1, gone, False)
    return kept & stay
