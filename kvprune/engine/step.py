"""One forward of the model with one cache: its tokens, and which of them are left.

Before each decoder layer the step asks the policies, gathers the survivors and hands their
position data along; after the last layer it scatters back to full length. A dropped token
keeps the hidden state with which it left.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.devices import Copies
from ..policy.base import TokenPolicy
from ..policy.budget import Lengths
from ..policy.moment import Moment
from ..policy.rotary import Rotary
from ..policy.stored import Stored
from ..policy.views import SlotView, Statistics, TokenView
from ..positions.base import Positions
from ..statistics import Queries, Statistic, parts_of
from ..storage.rows import PromptIds
from .arrival import Arrival
from .judged import Judged
from .second_reading import Repeat
from .survivors import surviving_tokens


class Step:
    """The tokens of one forward on their way through the layers.

    All tensors are where the model is handed its tokens. Where a layer is elsewhere, `columns_on`
    and `padding_on` have their copies there, and `rows.on` has those of the rows' facts.

    Args:
        policies: as they work on the model.
        num_layers: of the model.
        seen: columns that the cache had been shown before.
        new: the tokens that arrive.
        asked: `[B, Q - drafts]` bool, tokens that logits are asked for, which are never pruned.
        moment: where the tokens before the drafts are between prompt and decoding.
        drafts: how many tokens, at the end, may be taken back; they are never pruned either.
        observed: statistics that are observed though no policy wants them.
        one_by_one: each layer treats drafts one by one, as slots may go in between.
        group: the processes that share the heads of a tensor parallel model; None for one alone.
        cache_positions: how positions are assigned inside the cache; None where they are not.
        position_ids: `[B, Q]`, the positions of all tokens, where these are assigned inside the
            cache, or where somebody reads queries before rotation; else None.
        rotations: of queries, by layer; empty where nobody reads them before rotation.
        reads: what the statistics of any layer read; see `Statistic`.
        read_again: whether what is read here will be read a second time before policies are asked,
            if a prompt ends with it.
        repeat: what is read a second time here; nothing of it stays. None in any other forward.
        heads_part: whether heads may hold different tokens by now; also where some policy may
            leave them so.

    Attributes:
        origin: `[B]`, the position of each row's first token; None where there are no positions.
        count: tokens of this forward, Q.
        columns: `[B, Q']` int64 of the tokens still on their way, -1 where a row has fewer.
        slot_columns: the same `[B, 1, Q']`, one object for all layers, which masks go by.
        tokens: `columns` as they were before any layer, `[B, Q]`.
        complete: it is known that none of `columns` is -1.
        rows: facts about the rows, this forward included.
        same_rows: whether these are as before this forward.
        padding: see `padding_so_far`.
        prunes: whether policies are asked before the layers.
        evicters: the policies that drop slots.
        read: the ids that will have been read as prompt once the forward is over.
        states: those of linear-attention layers before it, where some of its tokens are padding.
        attended: by layer, the columns that were attended to; None where nobody asked.
        attentions: how many layers have attended.
        previous: the statistics of the tokens in the layer before.
        layer_steps: by layer, this forward there; see `layer_step.at_layer`.
        due: layers that are alike, which give up a slot together after the last of them.
        put_off: layers that give up slots after the last one, each with what is left there so far.
        notes: what positions inside the cache remember until the forward is over.
        arranged: the layer that stored its tokens last, and all its keys `[B, Hkv, S, D]` at their
            positions inside the cache; None where positions are not assigned there.
        read_last: of views of layers that hold codes, the one whose keys or values were read last.
        around: whether it began around the model with the decoder layers, before masks were made.
        shown: by layer, what statistics say of the hidden states that entered it, each with the
            tokens' columns.
        norms: by layer, the norms of the hidden states that entered it, `[B, Q]`, in a second
            reading that is weighted by them.
        judged: how pruning judges the tokens; None where nobody asks.
        not_finite: rows with activations that are not finite, as the user was told.
    """

    def __init__(
        self,
        policies: Sequence[TokenPolicy],
        num_layers: int,
        seen: int,
        new: Arrival,
        asked: Tensor,
        moment: Moment,
        observed: tuple[Statistic, ...] = (),
        drafts: int = 0,
        one_by_one: bool = False,
        group: Any = None,
        cache_positions: Positions | None = None,
        position_ids: Tensor | None = None,
        rotations: Sequence[Rotary] = (),
        reads: frozenset[str] = frozenset(),
        read_again: bool = False,
        repeat: Repeat | None = None,
        heads_part: bool = False,
    ) -> None:
        self._pruners = [p for p in policies if "rank_hidden" in p.hooks]
        self.evicters = [p for p in policies if p.evicts]
        self.heads_part = heads_part or any(not p.shares_heads for p in self.evicters)
        self.around = False
        self.waits = read_again and moment.ends
        self.repeat = repeat
        self.norms: dict[int, Tensor] = {}
        self._across = self.waits or any("rank_layers" in p.hooks for p in self.evicters)
        self.num_layers = num_layers
        self.group = group
        self.cache_positions = cache_positions
        columns = new.columns
        self.position_ids = position_ids
        self.origin = None if position_ids is None else position_ids[:, 0]
        self.rotations = rotations
        self.read_last: list[Stored] = []
        self._asked = asked
        self._places: Tensor | None = None
        self._parked: Tensor | None = None
        self._aligned: dict[tuple[int, torch.device], tuple[Any, Any]] = {}
        self._copies = Copies()
        self.attended: dict[int, Tensor] | None = None
        self.not_finite: set[int] = set()
        self.attentions = 0
        self.notes: dict[str, Any] = {}
        self.arranged: tuple[Any, Tensor] | None = None
        self._slot_columns: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.previous = Statistics({})
        self.moment = moment
        self._observed = observed
        self.layer_steps: dict[int, Any] = {}
        self.due: dict[Hashable, list[Any]] = {}
        self._early: tuple[Moment, list[tuple[int, TokenPolicy]]] | None = None
        self._awaiting: dict[Statistic, tuple[Moment, list[TokenPolicy]]] = {}
        self.reads = reads
        self.shown: dict[int, list[tuple[Statistic, Tensor, Tensor]]] = {}
        self.judged = Judged(seen, columns.shape[1]) if "survival" in reads else None
        self.put_off: list[tuple[Any, SlotView]] = []
        self.seen = seen
        self.count = columns.shape[1]
        self.drafts = drafts
        self.one_by_one = one_by_one
        self.prunes = self.count - drafts > 1 and bool(self._pruners)
        lead = columns[:, : self.count - drafts]
        self._lengths = Lengths((lead >= 0).sum(-1)) if self.prunes else None
        self.columns = columns
        self.tokens = columns
        self.slot_columns = columns[:, None]
        self.complete = new.complete
        self.rows = new.rows
        self.same_rows = new.same_rows
        self.padding = new.padding
        self.read: PromptIds | None = None
        self.states: list[tuple[Any, int, Tensor]] = []

    @property
    def whole(self) -> bool:
        """Whether none of its tokens was pruned so far."""
        return self._places is None

    def due_at(self, layer: int, moment: Moment) -> list[tuple[int, TokenPolicy]]:
        """The policies that are asked about a layer's slots right away, each with its number."""
        if self._early is None or self._early[0] is not moment:
            late = self.late_at(moment)
            early = enumerate(self.evicters[: late[0][0]] if late else self.evicters)
            # Once for all layers: most have the same moment.
            self._early = moment, [each for each in early if each[1].is_due(moment)]
        return [each for each in self._early[1] if each[1].applies(layer)]

    def late_at(self, moment: Moment) -> list[tuple[int, TokenPolicy]]:
        """The policies that are asked after the last layer, each with its number.

        From the first one on that sees all layers at once; all where a second reading follows.
        """
        if not self._across:
            return []
        due = [each for each in enumerate(self.evicters) if each[1].is_due(moment)]
        if self.waits:
            return due
        first = (i for i, (_, policy) in enumerate(due) if "rank_layers" in policy.hooks)
        return due[next(first, len(due)) :]

    def moment_of_draft(self, seen: int) -> Moment:
        """The moment of a draft with which `seen` columns were shown."""
        lead = self.seen + self.count - self.drafts
        return Moment(new=1, since=self.moment.since + seen - lead)

    def awaits(self, part: Statistic, layer: int, moment: Moment) -> bool:
        """Whether somebody reads what a layer observes at this moment, now or later."""
        if part in self._observed or self._pruning_awaits(part, layer, self.prunes):
            return True
        known = self._awaiting.get(part)
        if known is None or known[0] is not moment:
            # Once for all layers: most have the same moment.
            known = moment, [p for p in self.evicters if p.awaits(part, moment)]
            self._awaiting[part] = known
        return any(p.applies(layer) for p in known[1])

    def still_awaits(self, part: Statistic, layer: int) -> bool:
        """Whether somebody reads a statistic behind this forward, before the next prompt begins."""
        after = Moment(new=0, left=self.moment.left, first=self.moment.first)
        if part in self._observed or self._pruning_awaits(part, layer, now=False):
            return True
        return any(p.applies(layer) and p.awaits(part, after) for p in self.evicters)

    def _pruning_awaits(self, part: Statistic, layer: int, now: bool) -> bool:
        """Whether a policy that prunes reads it, now or in a later piece of the prompt."""
        asking = (p for p in self._pruners if p.applies(layer + 1))
        return (now or self.moment.left > 0) and any(
            part in parts_of(policy.statistics) for policy in asking
        )

    def queries_before(self, layer: int) -> list[Queries]:
        """What newest queries a policy wants of the layer before, to prune what enters `layer`."""
        wanted = [s for p in self._pruners if p.applies(layer) for s in p.statistics]
        return [statistic for statistic in wanted if isinstance(statistic, Queries)]

    def columns_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`columns` and `slot_columns` on a device; one object each for all layers there."""
        if self.columns.device == device:
            return self.columns, self.slot_columns
        columns = self._copies.on(self.columns, device)
        if device not in self._slot_columns or self._slot_columns[device][0] is not columns:
            self._slot_columns[device] = (columns, columns[:, None])
        return self._slot_columns[device]

    def padding_on(self, device: torch.device) -> Tensor | None:
        """`padding` on a device."""
        return self.on(self.padding, device)

    def on(self, tensor: Tensor | None, device: torch.device) -> Tensor | None:
        """One of its tensors on a device, one object for all layers there."""
        return None if tensor is None else self._copies.on(tensor, device)

    def enter(self, layer: int, hidden: Tensor) -> Tensor:
        """Drops what no longer enters `layer`: `[B, Q, C]` to `[B, Q', C]`.

        Asked only where the step `prunes`: in forwards of several tokens, if a policy does.
        """
        assert self._lengths is not None
        # That of the layer before: accelerate moves them on inside this one.
        device = hidden.device
        lead = self.columns.shape[1] - self.drafts
        columns, rows = self.columns_on(device)[0][:, :lead], self.rows.on(device)
        tokens = TokenView(
            layer=layer,
            num_layers=self.num_layers,
            hidden=hidden[:, :lead].detach(),
            columns=columns,
            valid=columns >= 0,
            first=rows.first,
            lengths=self._lengths.on(device),
            statistic=self.previous,
            group=self.group,
            begin=rows.begin,
        )
        asked = self._copies.on(self._asked, device)
        if self._places is not None:
            asked = asked.gather(1, self._copies.on(self._places, device)[:, :lead])
        # For this layer alone: one without attention observes nothing for the next.
        self.previous = Statistics({})
        kept = surviving_tokens(self._pruners, tokens, asked, self.not_finite, self.judged)
        if kept is None or torch.equal(kept, tokens.valid):
            return hidden
        return self._narrow(kept, hidden)

    def _narrow(self, kept: Tensor, hidden: Tensor) -> Tensor:
        """Keeps of the tokens before the drafts those that are named, `[B, Q' - drafts]`."""
        fewest, most = torch.stack(kept.sum(-1).aminmax()).tolist()
        drafts = torch.arange(kept.shape[1], self.columns.shape[1], device=kept.device)
        drafts = drafts.expand(kept.shape[0], -1)
        # The survivors in order; before them, to fill shorter rows, some that are dropped: there
        # padding is in any case, and linear layers, whose states end with the last tokens, need it.
        order = kept.byte().argsort(dim=-1, stable=True)[:, kept.shape[1] - max(most, 1) :]
        order = torch.cat([order, drafts], 1)
        kept = torch.nn.functional.pad(kept, (0, self.drafts), value=True)
        self._parked = hidden if self._parked is None else self._written_back(hidden)
        places = None if self._places is None else self._copies.on(self._places, order.device)
        self._places = order if places is None else places.gather(1, order)
        self.columns = self.columns_on(order.device)[0].masked_fill(~kept, -1).gather(1, order)
        self.slot_columns = self.columns[:, None]
        self.complete = fewest == max(most, 1)
        self._aligned = {}
        return _gathered(hidden, order)

    def leave(self, hidden: Tensor) -> Tensor:
        """Back to full length after the last layer: `[B, Q', C]` to `[B, Q, C]`."""
        return hidden if self._parked is None else self._written_back(hidden)

    def _written_back(self, hidden: Tensor) -> Tensor:
        assert self._parked is not None
        if self._places is None:
            return hidden
        parked = self._parked.to(hidden.device)
        places = self._copies.on(self._places, hidden.device)
        # Places are unique, also those that only fill shorter rows: these keep what they had.
        before = _gathered(parked, places)
        valid = self.columns_on(hidden.device)[0] >= 0
        hidden = torch.where(valid[..., None], hidden, before)
        return parked.scatter(1, places[..., None].expand_as(hidden), hidden)

    def align(self, value: Any, device: torch.device) -> Any:
        """Gathers whatever has the length of this forward's tokens to those that are left.

        Args:
            value: as the model hands it to its layers: a tensor with an axis for the tokens, as
                `[1|B, Q, ...]`, `[1|B, 1, Q, ...]` or `[n, 1|B, Q, ...]`; a tuple, list or dict
                of such; anything else comes back as it is.
            device: where the tokens' hidden states are.
        """
        if self._places is None or not isinstance(value, (Tensor, tuple, list, dict)):
            return value
        # Every layer is handed the same full-length data again.
        key = (id(value), device)
        if key not in self._aligned:
            self._aligned[key] = (value, self._gather_tokens(value, device))
        return self._aligned[key][1]

    def _gather_tokens(self, value: Any, device: torch.device) -> Any:
        if type(value) in (tuple, list):
            return type(value)(self._gather_tokens(v, device) for v in value)
        # Not what is derived from dict: models keep things of their own in it.
        if type(value) is dict:
            return {name: self._gather_tokens(v, device) for name, v in value.items()}
        axes = self._token_axes(value) if isinstance(value, Tensor) else None
        if axes is None:
            return value
        assert self._places is not None
        places = self._copies.on(self._places, value.device)
        value = value.movedim(axes, (0, 1))
        value = _gathered(value.expand(places.shape[0], *value.shape[1:]), places)
        return value.movedim((0, 1), axes).to(device)

    def _token_axes(self, value: Tensor) -> tuple[int, int] | None:
        """The axes of a tensor that are rows and this forward's tokens; None if it has none."""
        shape, rows = value.shape, self.columns.shape[0]
        for axis in range(1, value.dim()):
            if shape[axis] != self.count or shape[axis - 1] not in (1, rows):
                continue
            # Between rows and tokens there may be an axis for all heads; before the rows one
            # for what each token has several of, as positions in pictures.
            before = [n for n in (axis - 1, 0) if shape[n] == rows] or [axis - 1]
            return before[0], axis
        return None

    def let_go(self) -> None:
        """Forgets the layers, which know their step in turn.

        What knows each other is freed by the garbage collector alone, and with it the keys and
        values of a cache that nobody has any more would wait for it.
        """
        self.layer_steps.clear()
        self.due.clear()
        self.put_off.clear()
        self.shown.clear()
        self.arranged = None


def _gathered(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens `[B, Q, ...]` at `places` `[B, Q']`."""
    index = places.reshape(*places.shape, *(1,) * (tokens.dim() - 2))
    return tokens.gather(1, index.expand(-1, -1, *tokens.shape[2:]))
