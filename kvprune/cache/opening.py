"""The beginning of a forward: what it brings is checked against what the cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.arrival import Arrival, asked_tokens, new_columns, padding_so_far
from ..engine.step import Step
from ..errors import KVPruneError
from ..policy.base import TokenPolicy
from ..policy.composition import evicts
from ..policy.moment import Moment
from ..positions.rotary import check_reach
from ..statistics import Statistic, parts_of
from ..storage.rows import rows_after
from .binding import Binding
from .guard import Guard
from .session import Session
from .state import CacheState


@dataclass(frozen=True)
class Opening:
    """A cache as a forward finds it.

    policies: as they were handed to the cache.
    observe: statistics that are observed though no policy wants them.
    binding: the cache's model.
    state: what the cache holds.
    session: what `generate` has told it.
    guard: refuses the cache from here on, where an error comes while slots move.
    """

    policies: tuple[TokenPolicy, ...]
    observe: tuple[Statistic, ...]
    binding: Binding
    state: CacheState
    session: Session
    guard: Guard

    def step(
        self,
        rows: int,
        count: int,
        mask: Tensor | None,
        device: torch.device,
        logits_to_keep: int | Tensor,
        positions: Tensor | None,
    ) -> Step:
        """A forward of `[rows, count]` tokens; see `WiredCache.open_step`."""
        state, session, attachment = self.state, self.session, self.binding.attachment
        self._check_size(rows, count)
        self._check_promise(rows)
        self._check_read_again()
        state.follow(device)
        new = self._arrival(rows, count, mask, device)
        repeat = session.repeat
        drafts = 0 if repeat is not None else session.drafts(state.seen, count)
        one_by_one = drafts > 0 and self._treats_drafts_apart(count - drafts)
        moment = self._moment(count, drafts)
        self._check_drafts(drafts, one_by_one, moment)
        if state.positions is not None:
            state.positions.check(state.rows, new.rows, state.seen)
        # Of a prompt with drafts behind it, what it would be asked for without them.
        keep = 1 if drafts else logits_to_keep
        lead = None if new.complete else new.columns[:, : count - drafts]
        asked = asked_tokens(keep, rows, count - drafts, device, lead)
        with self.guard.moving("the beginning of a forward"):
            state.settle()
        position_ids = None
        awaited = state.positions is None and self._awaits_positions(moment)
        if state.positions is not None or awaited:
            positions = _one_each(positions)
        if state.positions is not None:
            layers = [layer for _, layer in state.slot_layers()]
            position_ids = state.positions.open(layers, new.columns, new.padding, new.rows)
        elif awaited:
            position_ids = self._positions_handed(positions, rows, count, device)
        # Nobody is asked about what is read a second time, and nothing else observes it.
        policies, observe = self.binding.policies, self.observe
        if repeat is not None:
            policies, observe = (), ()
        step = Step(
            policies,
            len(state.layers),
            state.seen,
            new,
            asked,
            moment,
            observe,
            drafts,
            one_by_one=one_by_one,
            group=attachment.group,
            cache_positions=state.positions,
            position_ids=position_ids,
            rotations=self.binding.rotations,
            reads=self.binding.reads,
            read_again=session.read_again,
            repeat=repeat,
            heads_part=state.fixed > 0,
        )
        step.read = state.read
        return step

    def _awaits_positions(self, moment: Moment) -> bool:
        """Whether somebody reads queries before rotation at this moment, or later."""
        if not self.binding.rotations:
            return False
        policies, observe = self.binding.policies, self.observe
        parts = parts_of([s for policy in policies for s in policy.statistics] + list(observe))
        return any(
            part in observe or any(policy.awaits(part, moment) for policy in policies)
            for part in parts
            if part.reads in ("unrotated", "rotations")
        )

    def _positions_handed(
        self, positions: Tensor | None, rows: int, count: int, device: torch.device
    ) -> Tensor:
        """The positions `[B, Q]` of a forward's tokens, from `[1|B, Q]` or none."""
        if positions is None:
            positions = torch.arange(self.state.seen, self.state.seen + count, device=device)
        check_reach(positions, self.binding.limit)
        # A copy: queries may wait with them, and the caller may write to their own.
        return positions.to(device, copy=True).expand(rows, -1)

    def _moment(self, count: int, drafts: int) -> Moment:
        """The moment of the tokens before the drafts."""
        state, end, lead = self.state, self.session.prompt_end, count - drafts
        after = state.seen + lead
        # In a loop of one's own, several tokens are a prompt.
        ends = state.seen < end <= after or (end == 0 and lead > 1)
        left = max(end - after, 0)
        since = 0 if ends or left else after - state.prompt_end
        again = ends and self.session.read_again
        return Moment(lead, left, since, ends, state.prompts == 0, again)

    def _treats_drafts_apart(self, lead: int) -> bool:
        """Whether drafts behind so many tokens must not be mixed up with them.

        Slots go for each, or somebody reads what the lead's tokens alone have given.
        """
        pruners = (p for p in self.policies if "rank_hidden" in p.hooks)
        reads = lead > 1 and any(p.statistics for p in pruners)
        return drops_slots(self.policies, self.state) or bool(self.observe) or reads

    def _check_size(self, rows: int, count: int) -> None:
        if self.state.rows is not None and self.state.batch_size != rows:
            raise KVPruneError(
                f"the batch size changed: expected {self.state.batch_size} rows as before, got "
                f"{rows}. Use a new cache, or batch_repeat_interleave / batch_select_indices"
            )
        if count == 0:
            raise KVPruneError("a forward of no tokens: expected at least one new token")

    def _check_promise(self, rows: int) -> None:
        promise = self.session.promise
        if isinstance(promise, Tensor) and promise.dim() and promise.shape[0] != rows:
            raise KVPruneError(
                f"a prompt with lengths of {promise.shape[0]} rows was announced: expected as many "
                f"rows, got {rows}"
            )

    def _check_read_again(self) -> None:
        """Refuses a first prompt that is read once, where a policy goes by a second reading."""
        if self.state.seen or self.session.read_again:
            return
        observed = [part for part in self.observe if part.reads == "second reading"]
        for policy in (*self.binding.policies, *observed):
            if not isinstance(policy, TokenPolicy) or policy.reads_again:
                raise KVPruneError(
                    f"{policy!r} reads the prompt a second time, which neither generate nor a "
                    f"forward does: expected a cache that has read it by kvprune.read:\n"
                    f"    kvprune.read(model, cache, document_ids)\n"
                    f"    model.generate(torch.cat([document_ids, question_ids], 1), cache=cache)"
                )

    def _arrival(self, rows: int, count: int, mask: Tensor | None, device: torch.device) -> Arrival:
        """The arrival of `[rows, count]` tokens; refuses a mask that does not fit."""
        state, session = self.state, self.session
        seen = state.seen
        repeats = session.repeat is not None
        if session.past_prompt(seen) and not repeats and (mask is None or mask.dim() == 2):
            # The mask of `generate` has ones for rows that have ended: their padding is hidden.
            mask = session.mask_of_ended(rows, count, seen, device)
        heads = self.binding.attachment.num_heads
        # Whoever pads a first prompt on the right reads the logits of padding next. Later on, a
        # row may pause, and the chunks of an announced prompt, which were looked at, may end so.
        may_end_in_padding = seen > 0 or session.prompt_end > 0
        columns = new_columns(rows, count, seen, mask, heads, may_end_in_padding, device)
        complete = mask is None or mask.dim() == 4 or bool((columns >= 0).all())
        padding = padding_so_far(state.padding, columns, mask)
        if state.is_hybrid:
            self._check_states(columns, complete, padding)
        # What counts as prompt: what `generate` promised, or any forward of several tokens.
        # Not what may be taken back.
        counts = count > 1 and not session.prompt_end and not session.recording
        added = (columns >= 0).sum(-1) if counts else session.promise
        same = padding is state.padding
        numbers = rows_after(state.rows, columns, added, padding, same)
        return Arrival(columns, complete, padding, numbers, numbers is state.rows)

    def _check_drafts(self, drafts: int, one_by_one: bool, moment: Moment) -> None:
        """Refuses drafts on a model that cannot take them back, or beside all layers at once.

        Args:
            drafts: how many there are.
            one_by_one: whether each layer treats them one by one.
            moment: of the tokens before them.
        """
        attachment = self.binding.attachment
        behind = [moment, *(Moment(1, since=moment.since + i + 1) for i in range(drafts))]
        for policy in self.binding.policies if drafts else ():
            if "rank_layers" in policy.hooks and any(policy.is_due(each) for each in behind):
                raise KVPruneError(
                    f"assisted decoding and recording with {policy!r} are refused: it "
                    f"ranks the slots of all layers at once, after the last one, while drafts are "
                    f"taken one by one in each layer. Leave out assistant_model and "
                    f"prompt_lookup_num_tokens"
                )
        if drafts and attachment.cannot_record and (one_by_one or self.state.is_hybrid):
            raise KVPruneError(
                f"assisted decoding and recording with {self.policies!r} on "
                f"{attachment.name} are refused: {attachment.cannot_record}; leave out "
                f"assistant_model and prompt_lookup_num_tokens"
            )

    def _check_states(self, columns: Tensor, complete: bool, padding: Tensor | None) -> None:
        """Refuses what layers that keep a state cannot do, with new tokens `[B, Q]`."""
        state = self.state
        rows, count = columns.shape
        pruners = [p for p in self.policies if "rank_hidden" in p.hooks]
        if pruners and rows > 1 and count > 1 and state.seen:
            raise KVPruneError(
                f"{pruners[0]!r}: a later forward of several tokens in {rows} rows. Rows lose "
                f"different numbers of tokens, which the states of this model's linear-attention "
                f"layers cannot follow then. Use one row per cache, or hand in the prompt at once"
            )
        if padding is not state.padding and bool(state.newly_hidden(padding).any()):
            raise KVPruneError(
                "attention_mask hides columns that this model's linear-attention layers have "
                "taken into their states: expected a mask that keeps what it showed before"
            )
        if complete or state.rows is None or count == 1:
            return
        here = columns >= 0
        began = (state.rows.first < state.seen).to(here.device)
        # Zeros that a first token follows change no state; behind one they do.
        behind = here.any(-1) & (began & ~here.all(-1) | ~began & (here.int().diff() < 0).any(-1))
        if bool(behind.any()):
            raise KVPruneError(
                f"padding beside new tokens in rows {behind.nonzero().flatten().tolist()}, which "
                f"have tokens before: the states of this model's linear-attention layers cannot "
                f"skip it. Expected, in a later forward, rows whose new tokens are all padding or "
                f"all none. Use one row per cache, or a new cache for all tokens"
            )


def _one_each(positions: Tensor | None) -> Tensor | None:
    """The positions of tokens, where each has one.

    Args:
        positions: `[1|B, Q]`, or `[n, 1|B, Q]` where tokens have several, as in pictures (mrope).

    Raises:
        KVPruneError: several that are not the same.
    """
    if positions is None or positions.dim() < 3:
        return positions
    # The first of four is the one in the text.
    turning = positions[-3:]
    if bool((turning != turning[:1]).any()):
        raise KVPruneError(
            "tokens with several positions each (mrope), as in pictures, together with positions "
            "inside the cache or with queries before rotation, which QueryMoments reads: expected "
            "text alone. Use positions='original', and a policy that reads no such queries, as "
            "SnapKV"
        )
    return turning[0]


def drops_slots(policies: Sequence[TokenPolicy], state: CacheState) -> bool:
    """Whether layers drop slots that were stored: by a policy, or out of sight."""
    return state.is_local or evicts(policies)
