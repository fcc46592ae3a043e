"""Pipeline and union of policies, built on the policy interface alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .asking import ask
from .errors import KVPruneError
from .parallel import agreed, any_process
from .policy import WITHHELD, Ranking, SlotView, TokenPolicy, TokenView, split_share
from .selection import Selection, check_leaves_some, check_ranking, first_to_go, wrong


def leaves(policies: Iterable[TokenPolicy]) -> Iterator[TokenPolicy]:
    """The policies with every union opened up, each to be checked by itself."""
    for policy in policies:
        yield from policy.parts if isinstance(policy, Union) else (policy,)


def answer_of(policy: TokenPolicy, hook: str, view: TokenView | SlotView) -> Ranking | None:
    """A policy's answer where it applies, from the statistics that it named."""
    if not policy.applies(view.layer):
        return None
    shown: dict[str, Any] = {"statistic": view.statistic.only(policy.statistics)}
    if hook == "rank_slots" and policy.layers_alike:
        shown |= {"keys": WITHHELD, "values": WITHHELD}
    ranking = ask(policy, hook, replace(view, **shown))
    shared = hook == "rank_hidden" or policy.shares_heads
    if shared and view.group is not None and isinstance(ranking, Ranking):
        return agreed(ranking, view.group)
    return ranking


def comparable(
    policy: TokenPolicy,
    ranking: Ranking,
    columns: Tensor,
    view: TokenView | SlotView,
    told: set[int],
) -> Ranking:
    """A ranking without NaN among its scores; to look for it waits for the device.

    A row whose activations are not finite, as after an overflow in float16, goes on as it does with
    any other cache: what has no score there ranks lowest, so that the newest stay. Other rows do
    not notice.

    Args:
        policy: who answered.
        ranking: the answer.
        columns: `[B, 1|H, S]`, what it ranked, -1 for what policies before it have dropped.
        view: what the first policy of the pipeline was shown.
        told: rows that a warning has named in this forward; those that this one names are added.

    Raises:
        KVPruneError: NaN in a row where all that was shown is finite.
    """
    nan = ranking.score.isnan()
    rows = (nan & (columns >= 0)).flatten(1).any(-1)
    if not bool(rows.any()):
        return ranking
    overflown = _not_finite(view)
    if view.group is not None and (isinstance(view, TokenView) or policy.shares_heads):
        overflown = any_process(overflown, view.group)
    if bool((rows & ~overflown).any()):
        mine = (rows & ~overflown).nonzero().flatten().tolist()
        came = f"NaN scores at layer {view.layer} in rows {mine}, where all it was shown is finite"
        raise wrong(policy, "scores that can be compared", came)
    new = sorted(set(rows.nonzero().flatten().tolist()) - told)
    told.update(new)
    if new:
        warnings.warn(
            f"the model's activations are not finite (NaN or infinite) at layer {view.layer} in "
            f"rows {new}, so that {policy!r} cannot rank there: the newest tokens of these rows "
            f"stay, and what the model makes of them means nothing. Other rows are right. Load the "
            f"model in bfloat16 or float32 if these are overflows of float16, or look for NaN in "
            f"its weights and inputs",
            RuntimeWarning,
            stacklevel=2,
        )
    return replace(ranking, score=ranking.score.masked_fill(nan, -torch.inf))


def _not_finite(view: TokenView | SlotView) -> Tensor:
    """The rows `[B]` where something that policies were shown is not finite."""
    valid = view.valid
    if isinstance(view, SlotView):
        shown = [(view.keys, valid[..., None]), (view.values, valid[..., None])]
    else:
        shown, valid = [(view.hidden, valid[..., None])], valid[:, None]
    shown += [(value, valid) for _, value in view.statistic.items()]
    # Not at padding and in empty slots, where anything may stand.
    each = [(~tensor.isfinite() & there).flatten(1).any(-1) for tensor, there in shown]
    return torch.stack(each).any(0)


def surviving_tokens(
    policies: Sequence[TokenPolicy], tokens: TokenView, asked: Tensor, told: set[int]
) -> Tensor | None:
    """The tokens that every policy in turn lets enter a layer.

    Args:
        policies: each sees the survivors of those before it.
        tokens: the view that the first one sees.
        asked: `[B, Q]` bool, tokens that the engine itself protects.
        told: see `comparable`.

    Returns:
        `[B, Q]` bool, or None where no policy ranked.
    """
    ranked, shown = False, tokens
    for policy in policies:
        ranking = answer_of(policy, "rank_hidden", tokens)
        if ranking is None:
            continue
        columns, valid = tokens.columns[:, None], tokens.valid[:, None]
        check_ranking(policy, ranking, columns, heads=1)
        ranking = comparable(policy, ranking, columns, shown, told)
        with_asked = replace(ranking, protected=ranking.protected | asked[:, None])
        selection = Selection(with_asked, columns, valid)
        check_leaves_some(policy, tokens.layer, ranking, valid, selection.least_budget)
        kept = selection.kept()[:, 0]
        tokens = replace(tokens, valid=kept, columns=tokens.columns.masked_fill(~kept, -1))
        ranked = True
    return tokens.valid if ranked else None


@dataclass(frozen=True)
class Survivors:
    """What a pipeline of policies says of a layer's slots.

    kept: `[B, 1|Hkv, S]` bool; None where all stay, or where `gone` says it.
    gone: `[B, 1|Hkv, 1]` int64, instead of `kept`, where it is known that one slot goes in every
        row and head.
    by: the policy, by its number, whose budget is full in every row and head, if it is the only one
        that evicts here and promises that each new token then costs one slot.
    """

    kept: Tensor | None = None
    gone: Tensor | None = None
    by: int | None = None


def surviving_slots(
    policies: Sequence[TokenPolicy], slots: SlotView, several: bool, told: set[int]
) -> Survivors:
    """The slots that every policy in turn keeps.

    Args:
        policies: each sees the survivors of those before it.
        slots: the view that the first one sees.
        several: whether this forward had several tokens; only then is NaN looked for.
        told: see `comparable`.
    """
    shown, before, heads, by = slots, slots.valid, slots.keys.shape[1], None
    # Of one alone: what another evicts may lower a budget, as that of sinks which are gone.
    alone = [p.constant_budget for p in policies if p.applies(slots.layer)] == [True]
    for number, policy in enumerate(policies):
        ranking = answer_of(policy, "rank_slots", slots)
        if ranking is None:
            continue
        check_ranking(policy, ranking, slots.columns, heads)
        if several:
            ranking = comparable(policy, ranking, slots.columns, shown, told)
        selection = Selection(ranking, slots.columns, slots.valid)
        check_leaves_some(policy, slots.layer, ranking, slots.valid, selection.least_budget)
        if not selection.nothing_goes:
            by = number if alone and selection.full else None
        if selection.one_goes and slots.valid is before and number == len(policies) - 1:
            return Survivors(gone=selection.gone(), by=by)
        if not selection.nothing_goes:
            kept = selection.kept()
            slots = replace(slots, valid=kept, columns=slots.columns.masked_fill(~kept, -1))
    return Survivors(kept=None if slots.valid is before else slots.valid, by=by)


def next_to_go(policy: TokenPolicy, slots: SlotView) -> Tensor | None:
    """The slot that goes, `[B, 1|Hkv, 1]`, where it is known that one does: by `policy`.

    Nothing is read off the device. None where the policy has nothing to say after all.
    """
    ranking = answer_of(policy, "rank_slots", slots)
    if ranking is None:
        return None
    check_ranking(policy, ranking, slots.columns, slots.keys.shape[1])
    return first_to_go(ranking.score, slots.valid & ~ranking.protected, slots.columns)


@dataclass(frozen=True, repr=False)
class Union(TokenPolicy):
    """`a | b`: keeps what either keeps, so its capacity is the sum.

    Each part ranks the same tokens; how many stay may differ per row and head. A part that
    says nothing about a hook, or does not apply to a layer, keeps everything there, and so
    does the union.

    Raises:
        KVPruneError: the parts share no hook, so the union would keep everything.
    """

    parts: tuple[TokenPolicy, ...] = ()

    @classmethod
    def of(cls, *parts: TokenPolicy) -> Union:
        """The union of `parts`; unions among them are opened up."""
        for part in parts:
            if not isinstance(part, TokenPolicy):
                raise KVPruneError(f"a | b: expected two policies, came {part!r}")
        flat = [p for part in parts for p in (part.parts if isinstance(part, cls) else (part,))]
        union = cls(tuple(flat))
        if not union.hooks:
            raise KVPruneError(
                f"{union!r} would keep everything: its parts share no hook (one prunes hidden "
                f"states, the other evicts slots). Use them as a pipeline: "
                f"ComposedCache([{', '.join(map(repr, flat))}])"
            )
        return union

    @property
    def hooks(self) -> frozenset[str]:
        """The hooks that all parts override."""
        return frozenset.intersection(*(p.hooks for p in self.parts))

    @property
    def statistics(self) -> tuple[str, ...]:  # type: ignore[override]
        """What any part wants observed."""
        return tuple(dict.fromkeys(name for p in self.parts for name in p.statistics))

    def with_budget(self, share: float) -> Union | None:
        """The share split evenly among the parts, so that they keep no more than that together.

        None where a part has no budget, as that may keep anything.
        """
        each = split_share(share, *(1 for _ in self.parts))
        parts = [p.with_budget(s) for p, s in zip(self.parts, each, strict=True)]
        found = tuple(part for part in parts if part is not None)
        return replace(self, parts=found) if len(found) == len(parts) else None

    def for_model(self, model: torch.nn.Module) -> Union:
        """The union of what its parts are on `model`."""
        return replace(self, parts=tuple(part.for_model(model) for part in self.parts))

    def rank_hidden(self, tokens: TokenView) -> Ranking | None:
        """Protects what any part keeps."""
        found = self._rankings("rank_hidden", tokens)
        if found is None:
            return None
        columns, valid = tokens.columns[:, None], tokens.valid[:, None]
        return self._either(found, tokens.layer, columns, valid, heads=1)

    def rank_slots(self, slots: SlotView) -> Ranking | None:
        """Protects what any part keeps."""
        found = self._rankings("rank_slots", slots)
        if found is None:
            return None
        heads = slots.keys.shape[1]
        return self._either(found, slots.layer, slots.columns, slots.valid, heads)

    def _rankings(self, hook: str, view: TokenView | SlotView) -> list[Ranking] | None:
        found: list[Ranking] = []
        for part in self.parts:
            ranking = answer_of(part, hook, view)
            if ranking is None:
                return None
            found.append(ranking)
        return found

    def _either(
        self, rankings: list[Ranking], layer: int, columns: Tensor, valid: Tensor, heads: int
    ) -> Ranking:
        kept = torch.zeros_like(valid)
        score = torch.zeros_like(valid, dtype=rankings[0].score.dtype)
        for part, ranking in zip(self.parts, rankings, strict=True):
            check_ranking(part, ranking, columns, heads)
            # NaN would rank highest.
            nan = ranking.score.isnan()
            lowest = replace(ranking, score=ranking.score.masked_fill(nan, -torch.inf))
            selection = Selection(lowest, columns, valid)
            check_leaves_some(part, layer, ranking, valid, selection.least_budget)
            kept = kept | selection.kept()
            # A part's NaN must still reach the engine, which looks for it.
            score = score.masked_fill(nan, torch.nan)
        return Ranking(score, kept, kept.sum(-1))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))
