"""The side of a cache that attached models see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import KVPruneError
from ..models.attachment import Attachment
from ..statistics import parts_of
from ..storage.rows import PromptIds
from .binding import bind
from .endings import Endings
from .opening import Opening, drops_slots
from .stock import StockCache


class WiredCache(StockCache):
    """A cache that attached models read into: what they call, in the order in which they do."""

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
        try:
            if self.session.pending and not failed and not self.guard.in_forward:
                self.crop(-self.session.pending)
        finally:
            self.session.leave(self.seen)
        if not failed and not self.session.recording:
            with self.guard.moving("the end of generate"):
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
            observe = tuple(parts_of(self.observe))
            opening = Opening(self.policies, observe, self.binding, self.state, self.session, guard)
            keep = guard.logits_to_keep
            step = opening.step(rows, count, mask, device, keep, positions)
            if self.on_evict is not None:
                self._tell_evictions()
                self._watch.begin(self.state)
        except BaseException:
            guard.release()
            raise
        guard.begin(step)
        self.session.in_stock_generate = False
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
    def attends_in_pieces(self) -> bool:
        """Whether the next forward never has its attention probabilities as a whole."""
        each = (layer.parts for _, layer in self.state.slot_layers())
        observes = any(part.of_attention for parts in each for part in parts)
        return observes or (self.session.recording and drops_slots(self.policies, self.state))

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
                    self._watch.arrived(step)
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
        if self.on_evict is not None:
            self._watch.read_again()
        self._tell_evictions()
