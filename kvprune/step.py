"""One forward of the model with one cache: its tokens, and which of them are left.

Before each decoder layer the step asks the policies, gathers the survivors and hands their
position data along; after the last layer it scatters back to full length. A dropped token
keeps the hidden state with which it left.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .composition import next_to_go, surviving_slots, surviving_tokens
from .devices import Copies
from .errors import KVPruneError
from .masks import Local
from .policy import Lengths, SlotView, TokenPolicy, TokenView, _Statistics
from .positions import Inside
from .rows import PromptIds, RowNumbers
from .slots import SlotLayer
from .together import Together


def new_columns(
    rows: int,
    count: int,
    seen: int,
    mask: Tensor | None,
    heads: int,
    may_end_in_padding: bool,
    device: torch.device,
) -> Tensor:
    """The columns of a forward's tokens, `[B, Q]` int64, -1 for padding.

    Args:
        rows, count: B and Q.
        seen: columns before them.
        mask: see `ComposedCache.open_step`; a 4-D one says nothing of padding.
        heads: Hq.
        may_end_in_padding: whether a row's tokens may have padding behind them, as in a chunk of
            a prompt, or where a row pauses.
        device: where the tokens are.

    Raises:
        KVPruneError: the mask does not fit, or pads on the right.
    """
    columns = torch.arange(seen, seen + count, device=device).expand(rows, -1)
    mask = None if mask is None else mask.to(device)
    if mask is None or _is_four_d(mask, rows, count, seen, heads):
        return columns.contiguous()
    if not may_end_in_padding:
        _check_left_padded(mask)
    return columns.masked_fill(mask[:, seen:] == 0, -1)


def _is_four_d(mask: Tensor, rows: int, count: int, seen: int, heads: int) -> bool:
    """Whether a mask is 4-D; refuses one of any other shape than is expected."""
    total = seen + count
    four_d = mask.dim() == 4 and mask.shape[0] in (1, rows) and mask.shape[1] in (1, heads)
    if four_d and mask.shape[2:] == (count, total):
        return True
    if mask.shape != (rows, total):
        raise KVPruneError(
            f"attention_mask: expected shape [{rows}, {total}] (all columns seen so far and "
            f"the new ones) or 4-D [1 or {rows}, 1 or {heads}, {count}, {total}], came "
            f"{list(mask.shape)}"
        )
    return False


def _check_left_padded(mask: Tensor) -> None:
    """Refuses padding behind a row's tokens `[B, columns]`."""
    right = (mask[:, -1] == 0) & mask.bool().any(-1)
    if bool(right.any()):
        raise KVPruneError(
            f"the batch is padded on the right in rows {right.nonzero().flatten().tolist()}: "
            f"expected left padding. Set tokenizer.padding_side = 'left'"
        )


def padding_so_far(
    before: Tensor | None, columns: Tensor, seen: int, mask: Tensor | None
) -> Tensor | None:
    """Which columns are padding, `[B, n]` bool; those behind are not. None if none is.

    What was padding once stays padding; a later mask may hide columns that were not. It is
    `before` itself where nothing is new.
    """
    if mask is None or mask.dim() == 4:
        return before
    padding = mask.to(columns.device) == 0
    known = torch.zeros_like(padding)
    if before is not None:
        known[:, : before.shape[1]] = before
    return padding | known if bool((padding & ~known).any()) else before


@dataclass(frozen=True, eq=False)
class Arrival:
    """What a forward brings to a cache.

    columns: `[B, Q]` int64, -1 for padding. complete: it is known that none is -1.
    padding: see `padding_so_far`.
    rows: the rows' numbers, this forward included; same_rows: whether they are as before it.
    """

    columns: Tensor
    complete: bool
    padding: Tensor | None
    rows: RowNumbers
    same_rows: bool


def asked_tokens(
    logits_to_keep: int | Tensor,
    rows: int,
    count: int,
    device: torch.device,
    columns: Tensor | None = None,
) -> Tensor:
    """`[B, Q]` bool, the tokens that logits are asked for; 0 means the last one alone.

    Args:
        logits_to_keep: as the model's forward takes it; a number is of each row's newest tokens,
            whatever padding is behind them.
        rows, count, device: of the tokens.
        columns: `[B, Q]`, theirs, -1 for padding; None if none is.

    Raises:
        KVPruneError: neither a number nor places of tokens that there are.
    """
    _check_asked(logits_to_keep, count)
    asked = torch.zeros(rows, count, dtype=torch.bool, device=device)
    if isinstance(logits_to_keep, int) and columns is not None:
        valid = columns >= 0
        behind = valid.flip(-1).cumsum(-1).flip(-1)
        asked = valid & (behind <= max(logits_to_keep, 1))
    elif isinstance(logits_to_keep, int):
        asked[:, -max(logits_to_keep, 1) :] = True
    elif logits_to_keep.dtype == torch.bool:
        asked |= logits_to_keep.to(device)
    else:
        places = logits_to_keep.to(device) % count
        asked.scatter_(1, places.expand(rows, -1) if places.dim() == 1 else places, True)
    return asked


def _check_asked(logits_to_keep: Any, count: int) -> None:
    number = isinstance(logits_to_keep, int)
    if not number and not (isinstance(logits_to_keep, Tensor) and logits_to_keep.dim() > 0):
        raise KVPruneError(
            f"logits_to_keep={logits_to_keep!r}: expected a number of tokens, or a tensor of their "
            f"places"
        )
    if number or logits_to_keep.dtype == torch.bool or not logits_to_keep.numel():
        return
    lowest, highest = (int(end) for end in logits_to_keep.aminmax())
    if lowest < -count or highest >= count:
        raise KVPruneError(
            f"logits_to_keep: expected places of {count} tokens, so from {-count} to {count - 1}, "
            f"came {lowest} to {highest}"
        )


class Step:
    """The tokens of one forward on their way through the layers.

    seen: columns that the cache had been shown before. count: tokens of this forward.
    columns: `[B, Q]` int64 of those still on their way, -1 where a row has fewer;
    slot_columns: the same `[B, 1, Q]`, one object for all layers, which masks go by.
    complete: it is known that none of `columns` is -1. rows: the rows' numbers, this forward
    included; same_rows: whether they are as before it.
    tokens: `columns` as they were before any layer.
    read: what will have been read as prompt once it is over.
    states: those of linear-attention layers before it, where some of its tokens are padding.
    padding: see `padding_so_far`. prunes: whether policies are asked before the layers.
    drafts: how many tokens, at the end, may be taken back; they are never pruned.
    position_ids: `[B, Q]` where positions are assigned inside the cache, by `inside`, of all its
    tokens; else None.
    one_by_one: each layer treats them one by one, as something may be evicted in between.

    All tensors are where the model is handed its tokens. Where a layer is elsewhere, `columns_on`
    and `padding_on` have their copies there, and `rows.on` has them of the rows' numbers.
    """

    def __init__(
        self,
        policies: Sequence[TokenPolicy],
        num_layers: int,
        seen: int,
        new: Arrival,
        asked: Tensor,
        drafts: int = 0,
        one_by_one: bool = False,
        group: Any = None,
        inside: Inside | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        self._pruners = [p for p in policies if "rank_hidden" in p.hooks]
        self._evicters = [p for p in policies if "rank_slots" in p.hooks]
        self._num_layers = num_layers
        self._group = group
        self.inside = inside
        columns = new.columns
        self.position_ids = position_ids
        self._asked = asked
        self._places: Tensor | None = None
        self._parked: Tensor | None = None
        self._aligned: dict[tuple[int, torch.device], tuple[Any, Any]] = {}
        self._copies = Copies()
        # By layer, the columns that were attended to, `[B, 1|Hkv, S]`; None where nobody asked.
        self.attended: dict[int, Tensor] | None = None
        # Rows whose activations are not finite, as the user was told.
        self._not_finite: set[int] = set()
        # How many layers were handed their part, and have not attended with it yet.
        self.unattended = 0
        # What positions inside the cache remember until the step is over.
        self.notes: dict[str, Any] = {}
        self._slot_columns: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._previous: dict[str, Tensor] = {}
        # Layers that are alike, which give up a slot together after the last of them.
        self._due: dict[Hashable, list[LayerStep]] = {}
        self._at: dict[int, LayerStep] = {}
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
            num_layers=self._num_layers,
            hidden=hidden[:, :lead].detach(),
            columns=columns,
            valid=columns >= 0,
            first=rows.first,
            lengths=self._lengths.on(device),
            statistic=_Statistics(self._previous),
            group=self._group,
            begin=rows.begin,
        )
        asked = self._copies.on(self._asked, device)
        if self._places is not None:
            asked = asked.gather(1, self._copies.on(self._places, device)[:, :lead])
        # For this layer alone: one without attention observes nothing for the next.
        self._previous = {}
        kept = surviving_tokens(self._pruners, tokens, asked, self._not_finite)
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

    def at_layer(self, index: int, slots: SlotLayer) -> LayerStep:
        """What the attention function of a layer is handed, with the tokens that are left."""
        known = self._at.get(index)
        if known is None or known.columns is not self.columns:
            device = self.columns.device
            positions = self.align(self.position_ids, device)
            origin = None if self.position_ids is None else self.position_ids[:, 0]
            known = LayerStep(
                step=self,
                index=index,
                slots=slots,
                columns=self.columns,
                slot_columns=self.slot_columns,
                complete=self.complete,
                seen=self.seen + self.count,
                before=self.seen,
                positions=positions,
                origin=None if origin is None else origin.to(device),
            )
            self._at[index] = known
        return known

    def evict(self, at: LayerStep) -> None:
        """Asks the policies after a layer's attention and drops what none keeps."""
        at = at.on(at.slots.device)
        new, slots = at.columns.shape[1], at.slots
        if self.prunes and at.seen <= self.seen + self.count - self.drafts:
            self._previous = {n: s[..., -new:].clone() for n, s in slots.statistics.items()}
        if not self._evicters and slots.local is None:
            return
        # Once: below a budget, where there is room for more, each is a view of its own.
        held = slots.columns
        columns = self._in_sight(slots.local, held, at.seen)
        if slots.full_for is not None and self.same_rows and columns is held:
            self._evict_next(at, slots.full_for)
            return
        view = self._view_of(at, columns, slots.statistics, at.rows)
        left = surviving_slots(self._evicters, view, new > 1, self._not_finite)
        # Not full any more, where a budget grew with the prompt.
        slots.full_for = left.by
        if columns is not held:
            slots.keep(_left(view.valid if left.kept is None else left.kept, left.gone))
        elif left.gone is not None:
            slots.free(left.gone, left.by)
        elif left.kept is not None:
            slots.keep(left.kept, left.by)

    def _evict_next(self, at: LayerStep, by: int) -> None:
        """One slot goes by the policy whose budget is full: now, or with other layers' slots."""
        policy, slots = self._evicters[by], at.slots
        alike = slots.alike() if policy.layers_alike and not self.one_by_one else None
        if alike is not None:
            self._due.setdefault(alike, []).append(at)
            return
        view = self._view_of(at, slots.columns, slots.statistics, at.rows)
        gone = next_to_go(policy, view)
        if gone is not None:
            slots.free(gone, by)

    def let_go(self) -> None:
        """Forgets the layers, which know their step in turn.

        What knows each other is freed by the garbage collector alone, and with it the keys and
        values of a cache that nobody has any more would wait for it.
        """
        self._at.clear()
        self._due.clear()

    def finish(self, before: Sequence[Together]) -> list[Together]:
        """Evicts, after the last layer, what layers that are alike give up at once.

        Args:
            before: what this gave in the step before.
        """
        return [self._evict_alike(due, before) for due in self._due.values()]

    def _evict_alike(self, due: list[LayerStep], before: Sequence[Together]) -> Together:
        layers = [at.slots for at in due]
        by = layers[0].full_for
        assert by is not None
        same = next((one for one in before if one.lent_to(layers)), None)
        joint = Together(layers) if same is None else same
        rows = due[0].rows.below(len(layers))
        view = self._view_of(due[0], joint.columns, joint.statistics, rows)
        gone = next_to_go(self._evicters[by], view)
        if gone is not None:
            joint.free(gone, by)
        return joint

    def _view_of(
        self, at: LayerStep, columns: Tensor, statistics: dict[str, Tensor], rows: RowNumbers
    ) -> SlotView:
        slots = at.slots
        return SlotView(
            layer=at.index,
            num_layers=self._num_layers,
            columns=columns,
            valid=columns >= 0,
            first=rows.first,
            seen=at.seen,
            lengths=rows.prompt,
            keys=slots.keys.detach(),
            values=slots.values.detach(),
            statistic=_Statistics(statistics),
            group=self._group,
            begin=rows.begin,
        )

    def _in_sight(self, local: Local | None, columns: Tensor, end: int) -> Tensor:
        """The same columns, -1 for those that no query at column `end` or later can see."""
        if local is None or end < local.size:
            return columns
        oldest = local.oldest(end, self.rows.on(columns.device).first)
        return columns.masked_fill(columns < oldest[:, None, None], -1)


@dataclass(frozen=True, eq=False)
class LayerStep:
    """One step, or a piece of one, at one layer: what the attention function is handed.

    index: the layer. columns: `[B, Q]` int64, of the queries; slot_columns: the same
    `[B, 1, Q]`. complete: none of them is -1. seen: columns shown with these; before: without.
    Where positions are assigned inside the cache, and None elsewhere: positions: `[B, Q]`, those
    of the queries; origin: `[B]`, that of the first token, which may be pruned by now.
    """

    step: Step
    index: int
    slots: SlotLayer
    columns: Tensor
    slot_columns: Tensor
    complete: bool
    seen: int
    before: int
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

    def store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new tokens `[B, Hkv, Q, D]`; returns all that the layer then holds."""
        step, slots = self.step, self.slots
        arrived = None if self.positions is None else self.positions[:, None]
        in_hole = step.count == 1
        held = slots.append(keys, values, self.slot_columns, self.complete, in_hole, arrived)
        slots.whole = slots.whole and step.whole
        slots.seen = self.seen
        return held if step.inside is None else (step.inside.arrange(self), slots.values)

    def pieces(self) -> Iterator[tuple[slice, LayerStep]]:
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
        piece = replace(
            self, columns=columns, slot_columns=columns[:, None], seen=seen, before=before
        )
        if self.positions is None:
            return piece
        positions = self.positions[:, start:stop]
        return replace(
            piece, positions=positions, origin=self.origin if start == 0 else positions[:, 0]
        )


def _left(kept: Tensor, gone: Tensor | None) -> Tensor:
    """The kept slots `[B, 1|Hkv, S]` without those at `gone` `[B, 1|Hkv, 1]`."""
    if gone is None:
        return kept
    stay = torch.ones_like(kept[:, :1]).repeat(1, gone.shape[1], 1).scatter(-1, gone, False)
    return kept & stay


def _gathered(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens `[B, Q, ...]` at `places` `[B, Q']`."""
    index = places.reshape(*places.shape, *(1,) * (tokens.dim() - 2))
    return tokens.gather(1, index.expand(-1, -1, *tokens.shape[2:]))
