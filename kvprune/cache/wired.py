"""The side of a cache that transformers and attached models see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..attention.masks import OURS
from ..engine.layer_step import LayerStep, at_layer
from ..engine.step import Step
from ..errors import KVPruneError
from ..models.attachment import Attachment
from ..policy.base import TokenPolicy
from ..policy.composition import evicts
from ..statistics import Statistic
from ..storage.layer import SlotLayer
from ..storage.quantized import Quantized
from ..storage.rows import PromptIds
from .binding import Binding, bind
from .endings import Endings
from .evictions import Arrived, Eviction, evictions, held_columns
from .guard import Guard
from .opening import Opening, drops_slots
from .session import Session
from .state import CacheState


class WiredCache(Cache):
    """A cache that attached models read into; see `ComposedCache`, which users make.

    Args:
        policies: a pipeline, checked.
        observe: statistics that are observed though no policy wants them, checked.
        store: how keys and values are held; None for as the model made them.

    Attributes:
        policies: see above.
        observe: see above.
        store: see above.
        state: what is held.
        session: what `generate` has said.
        guard: who uses the cache.
        binding: the model that the cache is tied to; None before its first use.
        on_evict: see `ComposedCache`.
    """

    on_evict: Callable[[Eviction], None] | None = None
    layers: list[Any]  # SlotLayer, or LinearAttentionLayer in hybrid models

    def __init__(
        self,
        policies: tuple[TokenPolicy, ...],
        observe: tuple[Statistic, ...],
        store: Quantized | None,
    ) -> None:
        super().__init__(layers=[])
        self.policies, self.observe, self.store = policies, observe, store
        self._begin()

    def _begin(self) -> None:
        """All that is not the user's choice, as it is in a cache that nothing was done with."""
        self.binding: Binding | None = None
        self.session = Session()
        self.guard = Guard()
        # For `on_evict`: what was held before the last forward, what that brought, and whether
        # what went is still to be told.
        self._held: dict[int, Tensor] = {}
        self._arrived: Arrived | None = None
        self._untold = False
        self._hold(CacheState([]))

    def _hold(self, state: CacheState) -> None:
        # transformers looks for `layers` on the cache itself: both must stay one list.
        self.state, self.layers = state, state.layers

    @property
    def seen(self) -> int:
        """Columns shown so far, padding included: the logical length."""
        return self.state.seen

    def slot_layers(self) -> Iterator[tuple[int, SlotLayer]]:
        """The layers that hold slots, each with its index: all of them but in hybrid models."""
        return self.state.slot_layers()

    def __len__(self) -> int:
        return len(self.layers)

    def __bool__(self) -> bool:
        # A cache that has no layers yet is not "no cache".
        return True

    # What transformers asks of a cache.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new keys and values and returns all that the layer then holds.

        Raises:
            KVPruneError: called outside a forward of an attached model.
        """
        if self.step.one_by_one:
            # Stored by the attention function, each when its turn comes.
            return key_states, value_states
        return self.at_layer(layer_idx).on(key_states.device).store(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length; the same for all layers, and 0 for those behind the last."""
        return self.seen if layer_idx < len(self.layers) or not self.layers else 0

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and sliding window of each layer, of the slots that it holds.

        As `DynamicCache` does; slots come in no order (`columns` has them sorted).
        """
        for layer in self.layers:
            local = getattr(layer, "local", None)
            yield layer.keys, layer.values, None if local is None else torch.tensor(local.size)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The logical length with this forward's tokens, and an offset of 0."""
        self.guard.check_in_forward()
        return self.seen + query_length, OURS

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no maximum."""
        return -1

    @property
    def is_initialized(self) -> bool:
        """Whether anything was stored yet."""
        return self.state.is_initialized

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` takes back all of the last forward, as assisted decoding asks."""
        return self.session.recording

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward."""
        return self.state.batch_size

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was (beam search)."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other."""
        rows = torch.arange(max(self.batch_size, 0))
        self._select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows that `indices` (ints or a bool mask) name."""
        rows = torch.arange(max(self.batch_size, 0), device=indices.device)
        self._select_rows(rows[indices])

    def _select_rows(self, rows: Tensor) -> None:
        self.guard.check_usable()
        self.state.select_rows(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the newest `-tokens_to_remove` columns.

        Raises:
            KVPruneError: a positive number, more than were seen, or what is gone would have
                to come back and was not recorded: after a policy that evicts, where a local
                layer dropped what could no longer be seen, or where a layer keeps a state.
        """
        self.guard.check_usable()
        whole = isinstance(tokens_to_remove, int)
        if not whole or tokens_to_remove > 0 or -tokens_to_remove > self.seen:
            raise KVPruneError(
                f"crop({tokens_to_remove!r}): expected minus the number of columns to take back, "
                f"at most {self.seen}"
            )
        back, state = -tokens_to_remove, self.state
        drops = evicts(self.policies) or self.seen - back < state.fixed
        if back > state.recorded and drops:
            raise KVPruneError(
                f"crop: what {list(self.policies)!r} evicted cannot come back: expected at most "
                f"the {state.recorded} columns of the last forward that were recorded. Call "
                f"activate_past_recording() before a forward that may have to be undone, or take "
                f"a copy.deepcopy of the cache"
            )
        if back > state.recorded and self.observe:
            raise KVPruneError(
                f"crop: what {list(self.observe)} counted of the columns that go cannot be taken "
                f"back: expected at most the {state.recorded} columns that were recorded. Call "
                f"activate_past_recording() first, or take a copy.deepcopy of the cache"
            )
        if back > state.recorded:
            state.check_still_there(self.seen - back)
        self.session.pending = 0
        state.take_back(back)
        self._tell_evictions()

    def activate_past_recording(self) -> None:
        """Lets `crop` take back, from here on, what the last forward read beyond the prompt.

        Such tokens, as the drafts of assisted and prompt-lookup decoding, are treated as if
        they came one by one: none is pruned, and every layer evicts after each. Nothing leaves
        its place before the next `crop` or forward. Ends with `generate`, or with `reset()`.
        """
        self.guard.check_usable()
        if self.session.in_stock_generate and not self.session.in_generate:
            raise KVPruneError(
                "assisted or prompt-lookup decoding by the generate of a model that kvprune is not "
                "attached to, around one that it is attached to: the whole prompt would count as "
                "drafts. Expected kvprune.attach(model) on the model whose generate is called; or "
                "leave out assistant_model and prompt_lookup_num_tokens"
            )
        self.session.recording = True

    @property
    def _is_user_defined(self) -> bool:
        """True: the cache is the user's to keep. transformers asks at the end of `generate`."""
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        # Every `generate` sets this on the cache that it is handed, before anything is read.
        self.session.in_stock_generate = not self.session.in_generate

    # What an attached model calls, in this order.

    def bind(self, attachment: Attachment, model: torch.nn.Module) -> None:
        """Ties the cache to a model on first use, and makes its layers.

        Args:
            attachment: the model's.
            model: the model that has the decoder layers.

        Raises:
            KVPruneError: the cache failed, it is tied to another model, or a policy cannot work
                on it.
        """
        # Before anything is said of what is handed in: it is the cache that has to go.
        if not self.guard.in_forward:
            self.guard.check_whole()
        known = None if self.binding is None else self.binding.attachment
        if known is attachment:
            return
        if known is not None:
            raise KVPruneError(
                f"this cache belongs to another model ({known.name}): expected the "
                f"object it was first used with, got another ({attachment.name}), or the same one "
                f"after it was detached or its layers were changed. Make a new ComposedCache"
            )
        binding, state = bind(self.policies, self.observe, self.store, attachment, model)
        self.binding = binding
        self._hold(state)

    def announce_prompt(
        self,
        new: Tensor | int,
        columns: int,
        endings: Endings | None = None,
        read_again: bool = False,
    ) -> None:
        """`generate` tells how many valid prompt tokens `[B]` follow, however it splits them.

        Args:
            new: how many.
            columns: of the whole prompt, what was seen before included.
            endings: what watches for rows that end; None where nobody does.
            read_again: whether the prompt will be read a second time; see `cache.second_reading`.
        """
        self.guard.check_usable()
        self.session.announce(new, columns, endings, read_again)

    def enter_generate(self, custom: bool = False) -> None:
        """Begins a `generate`: what follows an announced prompt does not count as prompt.

        Args:
            custom: whether it runs a function of the user's (`custom_generate`), in which there may
                be another `generate`.

        Raises:
            KVPruneError: the cache is in use or failed.
        """
        self.guard.check_usable()
        # Two threads cannot both enter.
        self.guard.claim()
        try:
            self.session.enter(self.seen, custom)
        finally:
            self.guard.release()

    def leave_generate(self) -> None:
        """`generate` is over, however it ended; drafts left in the air were never read."""
        failed = bool(self.guard.failure)
        if self.session.pending and not failed and not self.guard.in_forward:
            self.crop(-self.session.pending)
        self.session.leave(self.seen)
        if not failed and not self.session.recording:
            self.state.settle()
            self._tell_evictions()

    def check_prompt_ids(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """Refuses ids that are not those of the prompt that was read; see `PromptIds`.

        Args:
            ids: `[B, n]`, all tokens so far and new ones.
            mask: `[B, n]`, 0 for padding; None for none.

        Raises:
            KVPruneError: they differ where neither is padding.
        """
        if self.state.read is None:
            return
        hidden = [] if self.state.padding is None else [self.state.padding]
        hidden += [] if mask is None else [mask == 0]
        found = self.state.read.difference(ids, hidden)
        if found is None:
            return
        rows, column = found
        raise KVPruneError(
            f"the prompt is not the one that this cache has read: its ids differ in rows {rows}, "
            f"first at column {column} of the {self.seen} seen so far. Expected all tokens so far "
            f"and new ones. Use a new ComposedCache, or cache.reset(), for another prompt"
        )

    def ask_logits(self, logits_to_keep: int | Tensor | None) -> None:
        """Notes the tokens whose logits this thread's next forward is asked for; none is pruned.

        None takes it back.
        """
        self.guard.ask_logits(logits_to_keep)

    def open_step(
        self,
        rows: int,
        count: int,
        mask: Tensor | None,
        device: torch.device,
        positions: Tensor | None = None,
    ) -> None:
        """Begins a forward of `[rows, count]` tokens.

        Args:
            rows: B.
            count: Q.
            mask: padding mask `[B, seen + Q]`, None for no padding, or a 4-D mask that the
                user gave, `[1|B, 1|Hq, Q, seen + Q]`.
            device: where the tokens are.
            positions: the positions that the model is handed, `[1|B, Q]` or `[n, 1|B, Q]`; None
                where it makes them from the columns.

        Raises:
            KVPruneError: the cache is in use or failed, there are no tokens, the batch size
                changed, the mask does not fit or pads a first prompt on the right. Nothing has
                changed then.
        """
        guard = self.guard
        guard.check_usable()
        guard.claim()
        try:
            assert self.binding is not None
            opening = Opening(self.policies, self.observe, self.binding, self.state, self.session)
            keep = guard.logits_to_keep
            step = opening.step(rows, count, mask, device, keep, positions)
        except BaseException:
            guard.release()
            raise
        guard.begin(step)
        self.session.in_stock_generate = False
        if self.on_evict is not None:
            self._tell_evictions()
            self._held = held_columns(self.state)
        try:
            self.state.make_way(step)
        except BaseException:
            guard.failure = "an error came at the beginning of a forward"
            guard.release()
            raise

    def note_ids(self, ids: Tensor) -> None:
        """Notes what is read as prompt in the forward that has begun, for `check_prompt_ids`.

        Args:
            ids: its tokens, `[B, Q]`.
        """
        step = self.step
        if step.repeat is not None:
            return
        count = self.session.prompt_tokens(self.seen, step.count)
        if count == 0 or torch.compiler.is_compiling():
            return
        read = self.state.read
        before = PromptIds.none(ids.shape[0]) if read is None else read
        columns = None if step.complete else step.columns[:, :count]
        step.read = before.followed(self.seen, ids[:, :count], columns)

    @property
    def step(self) -> Step:
        """The forward that is under way.

        Raises:
            KVPruneError: there is none, so the model is not attached.
        """
        return self.guard.step

    @property
    def attends_in_pieces(self) -> bool:
        """Whether the next forward never has its attention probabilities as a whole."""
        each = (layer.parts for _, layer in self.state.slot_layers())
        observes = any(part.of_attention for parts in each for part in parts)
        return observes or (self.session.recording and drops_slots(self.policies, self.state))

    def at_layer(self, layer: int) -> LayerStep:
        """The forward that is under way at a layer, for the layer's attention."""
        return at_layer(self.step, layer, self.state.slots(layer))

    def close_step(self, done: bool) -> None:
        """Ends the forward that this thread began, if it did.

        After an error inside (`done=False`) layers may be out of step with each other, so
        the cache refuses to be used until `reset()`.
        """
        step = self.guard.own_step()
        if step is None:
            return
        self.guard.failure = "an error ended a forward in its middle"
        try:
            if done:
                self.state.take_over(step)
                self.session.promise = 0
                self.session.pending = step.drafts
                self.guard.failure = ""
                if self.on_evict is not None and step.repeat is None:
                    self._arrived, self._untold = Arrived.of(step), True
                    # What drafts evict may come back.
                    if not self.state.recorded:
                        self._tell_evictions()
        finally:
            self.guard.release()
            if self.state.waiting is not step:
                step.let_go()

    def end_second_reading(self) -> None:
        """Asks the policies that wait for it."""
        self.state.end_second_reading()
        self._untold = self.on_evict is not None
        self._tell_evictions()

    def _tell_evictions(self) -> None:
        """Tells `on_evict` what went since the last forward began, once, if anybody listens."""
        if self.on_evict is None or not self._untold:
            return
        found = list(evictions(self._held, self.state, self._arrived))
        self._held, self._arrived, self._untold = held_columns(self.state), None, False
        for each in found:
            self.on_evict(each)
