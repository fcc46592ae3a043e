"""All that a cache holds of the tokens it was shown, and what can be done with it as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..engine.step import Step
from ..engine.turnover import evict_across, evict_together
from ..errors import KVPruneError
from ..models.releases import LinearAttentionLayer
from ..positions.base import Positions
from ..storage.group import LayerGroup
from ..storage.layer import SlotLayer
from ..storage.rows import PromptIds, RowNumbers


class CacheState:
    """The contents of one cache; a cache that forgets everything has a new one.

    Args:
        layers: empty ones, one for each decoder layer.
        positions: how positions are assigned inside the cache; None where they are not.

    Attributes:
        layers: slots, or in hybrid models states, by decoder layer.
        positions: see above.
        seen: columns shown so far, padding included.
        prompt_end: the column behind the last prompt's; 0 before a prompt has ended.
        prompts: how many prompts have ended.
        mid_prompt: whether the last forward left some of an announced prompt to come.
        rows: what is known of each row; None before the first forward.
        padding: `[B, n]` bool, which columns are padding; those behind are not. None while none is.
        read: the ids that were read as prompt, to know them again; None while there are none.
        attended: by layer, the columns that the last forward attended to, if it was asked for
            attentions.
        together: layers that give up slots together, of the last forward.
        recorded: how many of the last forward's columns can be taken back though something was
            evicted since.
        waiting: the forward that ended a prompt which is being read a second time; its policies are
            still to be asked. None at any other time.
        fixed: columns that stay for good: what was evicted before the cache was saved is unknown.
    """

    def __init__(
        self,
        layers: list[SlotLayer | LinearAttentionLayer],
        positions: Positions | None = None,
    ) -> None:
        self.layers: list[Any] = layers
        self.positions = positions
        self.seen = 0
        self.prompt_end = self.prompts = 0
        self.mid_prompt = False
        self.rows: RowNumbers | None = None
        self.padding: Tensor | None = None
        self.read: PromptIds | None = None
        self.attended: dict[int, Tensor] = {}
        self.together: list[LayerGroup] = []
        self.recorded = 0
        self.waiting: Step | None = None
        self.fixed = 0

    # What there is.

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward."""
        return -1 if self.rows is None else self.rows.first.shape[0]

    @property
    def is_hybrid(self) -> bool:
        """Whether some layers keep a state instead of slots."""
        return not all(isinstance(layer, SlotLayer) for layer in self.layers)

    @property
    def is_initialized(self) -> bool:
        """Whether anything was stored yet."""
        return any(layer.is_initialized for _, layer in self.slot_layers())

    @property
    def is_local(self) -> bool:
        """Whether some layers drop what can no longer be seen."""
        return any(layer.local is not None for _, layer in self.slot_layers())

    def slot_layers(self) -> Iterator[tuple[int, SlotLayer]]:
        """The layers that hold slots, which is all of them but in hybrid models."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SlotLayer):
                yield index, layer

    def slots(self, layer: int) -> SlotLayer:
        """The slots of a layer.

        Raises:
            KVPruneError: there is no such layer, or it holds no slots.
        """
        count = len(self.layers)
        if not -count <= layer < count:
            raise KVPruneError(f"layer {layer}: expected a layer of 0 to {count - 1}")
        found = self.layers[layer]
        if not isinstance(found, SlotLayer):
            raise KVPruneError(f"layer {layer} holds no slots: it is a linear-attention layer")
        return found

    def tensors(self) -> Iterator[Tensor]:
        """All that is held on the model's devices, for counting bytes."""
        for layer in self.layers:
            yield from layer.tensors() if isinstance(layer, SlotLayer) else _states(layer)
        yield from self.attended.values()
        if self.rows is not None:
            yield from self.rows.tensors()
        if self.padding is not None:
            yield self.padding
        if self.positions is not None:
            yield from self.positions.tensors()

    # What a forward does.

    def follow(self, device: torch.device) -> None:
        """Moves rows and padding to the device of a forward's tokens, if they are elsewhere."""
        if self.rows is None or self.rows.first.device == device:
            return
        self.rows = self.rows.on(device)
        self.padding = None if self.padding is None else self.padding.to(device)

    def make_way(self, step: Step) -> None:
        """Before the layers run: slots go that a later mask hides, free slots take the token."""
        moment = step.moment
        if (moment.ends or moment.left) and not self.mid_prompt:
            # A prompt begins, and with it what is known of a layer.
            for _, layer in self.slot_layers():
                layer.forget_records()
        if step.padding is not self.padding:
            self._hide(step.padding)
        if self.is_hybrid and self.seen and not step.complete:
            step.states = [state for layer in self.layers for state in _copied_states(layer)]
        if step.count == 1 and not step.one_by_one:
            for joint in self.together:
                joint.write_column(step.columns_on(joint.columns.device)[1])

    def _hide(self, padding: Tensor | None) -> None:
        """Drops slots that a later mask hides, as a chat does with what follows eos."""
        new = self.newly_hidden(padding)
        if not bool(new.any()):
            return
        for _, layer in self.slot_layers():
            shape = (*layer.columns.shape[:2], -1)
            here = new.to(layer.columns.device)[:, None].expand(shape)
            hidden = here.gather(-1, layer.columns.clamp(min=0))
            layer.keep((layer.columns >= 0) & ~hidden, loses=False)

    def newly_hidden(self, padding: Tensor | None) -> Tensor:
        """The columns seen so far that a forward's mask is the first to hide, `[B, seen]` bool."""
        assert padding is not None
        new = padding[:, : self.seen].clone()
        if self.padding is not None:
            new[:, : self.padding.shape[1]] &= ~self.padding
        return new

    def take_over(self, step: Step) -> None:
        """After the last layer: what the forward leaves behind."""
        if step.repeat is not None:
            # Nothing but votes.
            for _, layer in self.slot_layers():
                layer.drop_newest(step.count)
            return
        if step.judged is not None:
            step.judged.tell(layer for _, layer in self.slot_layers())
        self.together = evict_together(step, self.together)
        if step.waits:
            self.waiting = step
        else:
            evict_across(step)
        _hold_states(step)
        self.mid_prompt = step.moment.left > 0
        if step.moment.ends:
            self.prompt_end, self.prompts = self.seen + step.moment.new, self.prompts + 1
        if not step.waits:
            self._forget_records(step)
        self.seen += step.count
        self.rows, self.padding, self.read = step.rows, step.padding, step.read
        self.attended = step.attended or {}
        self.recorded = step.drafts if step.one_by_one else 0

    def _forget_records(self, step: Step) -> None:
        if not step.moment.ends and not step.prunes:
            # Who reads a statistic changes at ends of prompts alone; see `Moment.comes`.
            return
        for index, layer in self.slot_layers():
            layer.forget_records([p for p in layer.layer_parts if step.still_awaits(p, index)])

    def give_up_second_reading(self) -> None:
        """Nobody is asked any more: all were, or an error came."""
        if self.waiting is not None:
            self.waiting.let_go()
        self.waiting = None

    # What happens between forwards.

    def end_second_reading(self) -> None:
        """Asks the policies at the end of a prompt that was read a second time."""
        if self.waiting is None:
            return
        # After an error the step is still there, for `give_up_second_reading`.
        evict_across(self.waiting)
        self._forget_records(self.waiting)
        self.give_up_second_reading()

    def settle(self, back: int = 0) -> None:
        """Takes back the last `back` recorded columns; the others stay for good."""
        for _, layer in self.slot_layers():
            layer.settle(back)
        self.recorded = 0

    def join_waiting(self) -> None:
        """Has statistics told of all that waits, before anything moves.

        Raises:
            KVPruneError: see `SlotLayer.join_waiting`; a user's `join` may raise anything.
        """
        for _, layer in self.slot_layers():
            layer.join_waiting()

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was (int64 `[B']`)."""
        if self.rows is None:
            return
        self.settle()
        self.together, self.attended = [], {}
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                layer.select_rows(rows)
            else:
                layer.reorder_cache(rows)
        self.rows = self.rows.select(rows)
        self.read = None if self.read is None else self.read.select(rows)
        if self.positions is not None:
            self.positions.select_rows(rows)
        if self.padding is not None:
            self.padding = self.padding.index_select(0, rows.to(self.padding.device))

    def take_back(self, count: int) -> None:
        """The newest `count` columns were never shown."""
        self.seen -= count
        self.prompt_end = min(self.prompt_end, self.seen)
        self.padding = None if self.padding is None else self.padding[:, : self.seen]
        self.read = None if self.read is None else self.read.until(self.seen)
        recorded = self.recorded
        if recorded:
            self.settle(min(count, recorded))
        if count > recorded:
            for _, layer in self.slot_layers():
                if layer.is_initialized:
                    layer.keep((layer.columns >= 0) & (layer.columns < self.seen))
                    layer.forget_records()
            # What was recorded is no prompt.
            self.rows = None if self.rows is None else self.rows.until(self.seen, self.padding)
        for _, layer in self.slot_layers():
            layer.seen = self.seen

    def check_still_there(self, seen: int) -> None:
        """Refuses to go back to `seen` columns if that cannot be.

        Raises:
            KVPruneError: a layer keeps a state, or has dropped what would be in sight again.
        """
        if self.rows is None:
            return
        if self.is_hybrid and seen < self.seen:
            raise KVPruneError(
                f"crop to {seen} columns: the states of the linear-attention layers cannot go "
                f"back. Take a copy.deepcopy of the cache before the forward that may have to be "
                f"undone"
            )
        first = self.rows.first
        for index, layer in self.slot_layers():
            if layer.local is None:
                continue
            gone, wanted = (layer.local.oldest(n, first) for n in (self.seen, seen))
            if bool((gone > wanted.maximum(first)).any()):
                raise KVPruneError(
                    f"crop to {seen} columns: layer {index} sees {layer.local.size} columns and "
                    f"has dropped some that would be in sight again. Take a copy.deepcopy of the "
                    f"cache before the forward that may have to be undone"
                )


def _states(layer: LinearAttentionLayer) -> Iterator[Tensor]:
    """The states of a linear-attention layer."""
    for state in (*layer.conv_states.values(), *layer.recurrent_states.values()):
        if state is not None:
            yield state


def _copied_states(
    layer: SlotLayer | LinearAttentionLayer,
) -> Iterator[tuple[dict[int, Tensor], int, Tensor]]:
    """The states of a linear-attention layer: the place of each, and a copy of it."""
    if not isinstance(layer, SlotLayer):
        for states in (layer.conv_states, layer.recurrent_states):
            for key, state in states.items():
                if state is not None:
                    yield states, key, state.clone()


def _hold_states(step: Step) -> None:
    """Rows that were handed padding alone keep the states that they had."""
    for states, key, before in step.states:
        still = (step.tokens < 0).all(-1).to(before.device)
        shape = (-1,) + (1,) * (before.dim() - 1)
        states[key] = torch.where(still.view(shape), before, states[key])
