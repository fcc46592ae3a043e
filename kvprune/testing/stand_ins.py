"""Policies that stand for others: to take notes, to promise nothing, to go by hand, or to fail."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..policy.asking import shown_by
from ..policy.base import TokenPolicy
from ..policy.composition import leaves
from ..policy.moment import Moment
from ..policy.selection import Ranking
from ..policy.stored import Stored
from ..policy.views import SlotView, TokenView
from ..statistics import Statistic
from ..storage.buffers import roomier
from ..storage.plain import Plain
from ..storage.quantized import Quantized
from .naive import naive_select


def inside(policies: Iterable[TokenPolicy]) -> dict[str, Any]:
    """The promises about positions of a policy that stands for others, or stands beside them."""
    parts = list(leaves(policies))
    # Sinks before a window are promised only where all that evict promise the same.
    answers = {p.sinks_before_window for p in parts if p.evicts}
    return {
        "positions_in_cache": any(p.positions_in_cache for p in parts),
        "sinks_before_window": answers.pop() if len(answers) == 1 else None,
    }


@dataclass(frozen=True)
class Note:
    """One question to a policy, and its answer.

    Attributes:
        hook: the name of the hook.
        view: the view that the policy was shown.
        answer: the policy's answer, if any.
        written: the view's tensors that the policy wrote into, by name.
        alike: whether the answer is the same for another layer; True without `layers_alike`.
        unordered: whether the same slots stay when they are shown in another order; True for
            hidden tokens.
    """

    hook: str
    view: TokenView | SlotView
    answer: Ranking | None
    written: tuple[str, ...]
    alike: bool
    unordered: bool

    @property
    def allowed(self) -> Tensor | None:
        """The number that may stay, `[B, H]`: the budget, or the protected if these are more."""
        if self.answer is None:
            return None
        valid = self.view.valid if self.view.valid.dim() == 3 else self.view.valid[:, None]
        protected = (valid & self.answer.protected).sum(-1)
        budget = self.answer.budget.reshape(valid.shape[0], -1)
        return torch.maximum(*torch.broadcast_tensors(budget, protected))


class Watched(TokenPolicy):
    """A policy without its promises, of which notes are taken; in all else it is like `base`.

    Args:
        base: the policy.
        notes: the list that notes are added to; None for a new one.
    """

    def __init__(self, base: TokenPolicy, notes: list[Note] | None = None) -> None:
        super().__init__(layers=base.layers, when=base.when)
        self.base: TokenPolicy = base
        self.notes: list[Note] = [] if notes is None else notes
        self.shares_heads = base.shares_heads
        self.__dict__.update(inside([base]))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The statistics that `base` wants."""
        return self.base.statistics

    @property
    def hooks(self) -> frozenset[str]:
        """The hooks of `base`."""
        return self.base.hooks

    def applies(self, layer: int) -> bool:
        """Whether `base` ranks at this layer."""
        return self.base.applies(layer)

    def is_due(self, moment: Moment) -> bool:
        """Whether `base` is asked at this moment."""
        return self.base.is_due(moment)

    def awaits(self, part: Statistic, moment: Moment) -> bool:
        """Whether `base` reads the statistic, now or later."""
        return self.base.awaits(part, moment)

    def for_model(self, model: torch.nn.Module) -> Watched:
        """The watched version of `base` on a model, with the same list of notes."""
        return Watched(self.base.for_model(model), self.notes)

    def rank_hidden(self, tokens: TokenView) -> Ranking | None:
        """The answer of `base`."""
        return self._note("rank_hidden", tokens)

    def rank_slots(self, slots: SlotView) -> Ranking | None:
        """The answer of `base`."""
        return self._note("rank_slots", slots)

    def rank_layers(self, layers: Sequence[SlotView]) -> Sequence[Ranking | None] | None:
        """The answer of `base`."""
        before = [
            [(name, tensor, tensor.clone()) for name, tensor in shown_by(view)] for view in layers
        ]
        answers = self.base.rank_layers(layers)
        turned = [_turned(view) for view in layers]
        nothing = [None] * len(layers)
        again = self.base.rank_layers(turned)
        each = zip(layers, answers or nothing, before, turned, again or nothing, strict=True)
        for view, answer, tensors, other, theirs in each:
            written = tuple(name for name, now, then in tensors if not torch.equal(now, then))
            unordered = _kept(answer, view) == _kept(theirs, other)
            self.notes.append(Note("rank_layers", view, answer, written, True, unordered))
        return answers

    def _note(self, hook: str, view: TokenView | SlotView) -> Ranking | None:
        if isinstance(view, SlotView) and not self.base.layers_alike:
            # Made now, so that it is seen whether they change.
            _ = view.keys, view.values
        before = [(name, tensor, tensor.clone()) for name, tensor in shown_by(view)]
        answer: Ranking | None = getattr(self.base, hook)(view)
        written = tuple(name for name, now, then in before if not torch.equal(now, then))
        alike = unordered = True
        if isinstance(view, SlotView):
            # The next layer that it ranks at, this one if there is no other.
            around = [(view.layer + i) % view.num_layers for i in range(1, view.num_layers + 1)]
            other = replace(view, layer=next(filter(self.base.applies, around), view.layer))
            alike = not self.base.layers_alike or _same(answer, self.base.rank_slots(other))
            turned = _turned(view)
            again = self.base.rank_slots(turned)
            unordered = _kept(answer, view) == _kept(again, turned)
        self.notes.append(Note(hook, view, answer, written, alike, unordered))
        return answer


def _turned(slots: SlotView) -> SlotView:
    """The same slots in reverse order."""
    return replace(
        slots,
        columns=slots.columns.flip(-1),
        valid=slots.valid.flip(-1),
        stored=Stored(slots.heads, lambda name: getattr(slots, name).flip(2)),
        statistic=slots.statistic.with_slots(lambda value: value.flip(-1)),
    )


def _kept(answer: Ranking | None, slots: SlotView) -> list[set[int]] | None:
    """The columns that stay, by row and head; None without an answer."""
    if answer is None:
        return None
    kept = naive_select(answer, slots.columns)
    columns = slots.columns.expand(-1, kept.shape[1], -1)
    heads = zip(columns.flatten(0, 1), kept.flatten(0, 1), strict=True)
    return [set(column[stays].tolist()) for column, stays in heads]


def _same(one: Ranking | None, other: Ranking | None) -> bool:
    if one is None or other is None:
        return one is other
    names = ("score", "protected", "budget")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


class ByHand(TokenPolicy):
    """Applies policies one after the other, entry by entry, in plain Python."""

    def __init__(self, policies: Sequence[TokenPolicy]) -> None:
        super().__init__()
        self.policies: Sequence[TokenPolicy] = policies
        self.__dict__.update(inside(policies))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The statistics that any of the policies wants."""
        return tuple(dict.fromkeys(s for p in self.policies for s in p.statistics))

    def awaits(self, part: Statistic, moment: Moment) -> bool:
        """Whether one of the policies does."""
        return any(policy.awaits(part, moment) for policy in self.policies)

    def for_model(self, model: torch.nn.Module) -> ByHand:
        """The same for the policies as they are on a model."""
        return ByHand([policy.for_model(model) for policy in self.policies])

    @property
    def hooks(self) -> frozenset[str]:
        """All layers are ranked at once where one of the policies does that."""
        across = any("rank_layers" in policy.hooks for policy in self.policies)
        return frozenset(("rank_hidden", "rank_layers" if across else "rank_slots"))

    def is_due(self, moment: Moment) -> bool:
        """True: each policy says by itself when it is due."""
        return True

    def rank_hidden(self, tokens: TokenView) -> Ranking | None:
        """Ranks by hand; the last token, whose logits these tests ask for, is protected."""
        last = torch.zeros_like(tokens.valid)
        last[:, -1] = True
        return self._ranking("rank_hidden", tokens, last & tokens.valid)

    def rank_slots(self, slots: SlotView) -> Ranking | None:
        """Ranks by hand; no slots are protected but by the policies."""
        return self._ranking("rank_slots", slots, None)

    def rank_layers(self, layers: Sequence[SlotView]) -> list[Ranking]:
        """Ranks by hand; policies that rank slots are asked about one layer after the other."""
        views = list(layers)
        for policy in self.policies:
            places = [place for place, view in enumerate(views) if policy.applies(view.layer)]
            if not policy.is_due(views[0].moment) or not policy.evicts:
                continue
            if "rank_layers" in policy.hooks:
                found = policy.rank_layers([views[place] for place in places])
                answers = [None] * len(places) if found is None else list(found)
            else:
                answers = [policy.rank_slots(views[place]) for place in places]
            for place, ranking in zip(places, answers, strict=True):
                if ranking is not None:
                    view = views[place]
                    kept = naive_select(ranking, view.columns)
                    columns = torch.where(kept, view.columns, -1)
                    views[place] = replace(view, columns=columns, valid=kept)
        valid = [view.valid for view in views]
        return [Ranking(stays.double(), stays, stays.sum(-1)) for stays in valid]

    def _ranking(self, hook: str, view: Any, asked: Tensor | None) -> Ranking:
        hidden = hook == "rank_hidden"
        for policy in self.policies:
            asked_now = policy.applies(view.layer) and (hidden or policy.is_due(view.moment))
            ranking = getattr(policy, hook)(view) if asked_now else None
            if ranking is None:
                continue
            columns = view.columns[:, None] if hidden else view.columns
            kept = naive_select(ranking, columns, None if asked is None else asked[:, None])
            columns = torch.where(kept, columns, -1)
            columns, kept = (columns[:, 0], kept[:, 0]) if hidden else (columns, kept)
            view = replace(view, columns=columns, valid=kept)
        valid = view.valid[:, None] if hidden else view.valid
        return Ranking(valid.double(), valid, valid.sum(-1))


class Fails(TokenPolicy):
    """Raises at one layer, as soon as a forward reaches a column.

    Args:
        layer: the layer to raise at.
        column: the column to reach, for the hook "rank_slots"; "rank_hidden" raises at once.
        hook: the hook that raises.
        others: the policies beside this one, whose promises about positions it takes over.
    """

    def __init__(
        self, layer: int, column: int, hook: str, others: Sequence[TokenPolicy] = ()
    ) -> None:
        super().__init__()
        self.at, self.column, self.hook = layer, column, hook
        self.__dict__.update(inside(others))

    def rank_hidden(self, tokens: TokenView) -> None:
        """Raises if this is the hook and the layer to raise at."""
        if self.hook == "rank_hidden" and tokens.layer == self.at:
            raise RuntimeError("as planned")

    def rank_slots(self, slots: SlotView) -> None:
        """Raises if this is the hook and the layer to raise at, and the column was reached."""
        if self.hook == "rank_slots" and slots.layer == self.at and slots.seen > self.column:
            raise RuntimeError("as planned")


@dataclass(frozen=True)
class ReadBack(Quantized):
    """A store that holds plainly what a `Quantized` would read back: the reference of stores."""

    @classmethod
    def like(cls, store: Quantized) -> ReadBack:
        """The reference of a store."""
        return cls(store.bits, store.group, store.rotate)

    @property
    def turns(self) -> bool:
        """False: it is held turned back."""
        return False

    def of(self, keys: Tensor, values: Tensor) -> Any:
        """See `Quantized.of`."""
        held = super().of(keys, values)
        return _PlainlyReadBack(self, held.keys(keys.shape[2]), held.values(keys.shape[2]))

    def restored(self, numbers: Any, tensors: Any, room: int) -> Any:
        """See `Quantized.restored`."""
        buffers = (roomier(tensors[name], room, 0) for name in ("keys", "values"))
        return _PlainlyReadBack(self, *buffers)


class _PlainlyReadBack(Plain):
    """Plain buffers, written to by way of codes."""

    def __init__(self, store: ReadBack, keys: Tensor, values: Tensor) -> None:
        super().__init__(keys, values)
        self._store = store

    def append(self, keys: Tensor, values: Tensor, used: int) -> None:
        """See `Plain.append`."""
        super().append(*self._read_back(keys, values), used)

    def put(self, slot: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `Plain.put`."""
        super().put(slot, *self._read_back(keys, values))

    def _read_back(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        held = Quantized.of(self._store, keys, values)
        return held.keys(keys.shape[2]), held.values(keys.shape[2])
