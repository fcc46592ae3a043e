"""A pipeline of policies, asked one after the other: the tokens and slots that all of them keep."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..policy.asking import answer_of, answers_of, any_process
from ..policy.base import TokenPolicy
from ..policy.selection import (
    Ranking,
    Selection,
    check_leaves_some,
    check_ranking,
    first_to_go,
    wrong,
)
from ..policy.views import SlotView, TokenView
from .judged import Judged

_METERS: list[Callable[[], AbstractContextManager[Any]]] = []
"""Contexts in which policies answer; empty but while costs are measured."""


@contextmanager
def metered(meter: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Has every policy answer inside a context of its own, of every cache and in every thread.

    The parts of a union answer inside the context of the union.

    Args:
        meter: makes the context of one answer.
    """
    _METERS.append(meter)
    try:
        yield
    finally:
        _METERS.remove(meter)


def ask_metered(policy: TokenPolicy, hook: str, view: TokenView | SlotView) -> Ranking | None:
    """The answer of a policy of the pipeline, metered if somebody measures costs."""
    # Contexts cost some time, in every layer and step.
    if not _METERS:
        return answer_of(policy, hook, view)
    with meters():
        return answer_of(policy, hook, view)


@contextmanager
def meters() -> Iterator[None]:
    """The contexts of what is a policy's own cost."""
    with ExitStack() as stack:
        for meter in tuple(_METERS):
            stack.enter_context(meter())
        yield


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
        got = f"NaN scores at layer {view.layer} in rows {mine}, where all it was shown is finite"
        raise wrong(policy, "scores that can be compared", got)
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
    per_slot = ((part, value) for part, value in view.statistic.tensors() if part.per == "slot")
    # The number that a slot begins with is not the model's, as the infinity of `Survival`.
    shown += [(value, valid & (value != part.start)) for part, value in per_slot]
    # Not at padding and in empty slots, where anything may stand.
    each = [(~tensor.isfinite() & there).flatten(1).any(-1) for tensor, there in shown]
    return torch.stack(each).any(0)


def surviving_tokens(
    policies: Sequence[TokenPolicy],
    tokens: TokenView,
    asked: Tensor,
    told: set[int],
    judged: Judged | None = None,
) -> Tensor | None:
    """The tokens that every policy in turn lets enter a layer.

    Args:
        policies: each sees the survivors of those before it.
        tokens: the view that the first one sees.
        asked: `[B, Q]` bool, tokens that the engine itself protects.
        told: see `comparable`.
        judged: takes down how each policy ranks; None where nobody asks.

    Returns:
        `[B, Q]` bool, or None where no policy ranked.
    """
    ranked, shown = False, tokens
    for policy in policies:
        ranking = ask_metered(policy, "rank_hidden", tokens)
        if ranking is None:
            continue
        columns, valid = tokens.columns[:, None], tokens.valid[:, None]
        check_ranking(policy, ranking, columns, heads=1)
        ranking = comparable(policy, ranking, columns, shown, told)
        with_asked = replace(ranking, protected=ranking.protected | asked[:, None])
        selection = Selection(with_asked, columns, valid)
        check_leaves_some(policy, tokens.layer, ranking, valid, selection.least_budget)
        kept = selection.kept()[:, 0]
        if judged is not None:
            judged.judge(ranking.score[:, 0], tokens.valid, kept, tokens.columns)
        tokens = replace(tokens, valid=kept, columns=tokens.columns.masked_fill(~kept, -1))
        ranked = True
    return tokens.valid if ranked else None


@dataclass(frozen=True)
class Survivors:
    """The answer of a pipeline of policies about a layer's slots.

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
    policies: Sequence[tuple[int, TokenPolicy]], slots: SlotView, several: bool, told: set[int]
) -> Survivors:
    """The slots that every policy in turn keeps.

    Args:
        policies: those that are due, each with its number; each sees the survivors of those before
            it.
        slots: the view that the first one sees.
        several: whether this forward had several tokens; only then is NaN looked for.
        told: see `comparable`.
    """
    shown, before, by = slots, slots.valid, None
    # Of one alone: what another evicts may lower a budget, as that of sinks which are gone.
    alone = [policy.constant_budget and policy.when is None for _, policy in policies] == [True]
    for number, policy in policies:
        ranking = ask_metered(policy, "rank_slots", slots)
        if ranking is None:
            continue
        selection = _selection(policy, ranking, slots, shown, several, told)
        if not selection.nothing_goes:
            by = number if alone and selection.full else None
        if selection.one_goes and slots.valid is before and number == policies[-1][0]:
            return Survivors(gone=selection.gone(), by=by)
        if not selection.nothing_goes:
            slots = narrowed(slots, selection.kept())
    return Survivors(kept=None if slots.valid is before else slots.valid, by=by)


def surviving_layers(
    policies: Sequence[tuple[int, TokenPolicy]],
    layers: list[SlotView],
    several: bool,
    told: set[int],
) -> list[SlotView]:
    """The slots that every policy in turn keeps, where some see all layers at once.

    Args:
        policies: those that are due, each with its number.
        layers: by layer, the view that the first one sees.
        several, told: see `surviving_slots`.

    Returns:
        the views, with what stays.
    """
    shown = list(layers)
    for _, policy in policies:
        if "rank_layers" in policy.hooks:
            with meters():
                rankings = answers_of(policy, layers)
        else:
            rankings = [ask_metered(policy, "rank_slots", view) for view in layers]
        for place, ranking in enumerate(rankings):
            if ranking is None:
                continue
            view = layers[place]
            selection = _selection(policy, ranking, view, shown[place], several, told)
            if not selection.nothing_goes:
                layers[place] = narrowed(view, selection.kept())
    return layers


def _selection(
    policy: TokenPolicy,
    ranking: Ranking,
    slots: SlotView,
    shown: SlotView,
    several: bool,
    told: set[int],
) -> Selection:
    """What a policy's ranking of slots comes to, checked.

    Args:
        policy, ranking: who answered, and what.
        slots: what it ranked.
        shown, told: see `comparable`.
        several: see `surviving_slots`.
    """
    check_ranking(policy, ranking, slots.columns, slots.heads)
    if several:
        ranking = comparable(policy, ranking, slots.columns, shown, told)
    selection = Selection(ranking, slots.columns, slots.valid)
    check_leaves_some(policy, slots.layer, ranking, slots.valid, selection.least_budget)
    return selection


def narrowed(slots: SlotView, kept: Tensor) -> SlotView:
    """The view without what does not stay, `[B, 1|Hkv, S]` bool."""
    return replace(slots, valid=kept, columns=slots.columns.masked_fill(~kept, -1))


def next_to_go(policy: TokenPolicy, slots: SlotView) -> Tensor | None:
    """The slot that goes, `[B, 1|Hkv, 1]`, without reading anything off the device.

    None where the policy has nothing to say after all.
    """
    ranking = ask_metered(policy, "rank_slots", slots)
    if ranking is None:
        return None
    check_ranking(policy, ranking, slots.columns, slots.heads)
    return first_to_go(ranking.score, slots.valid & ~ranking.protected, slots.columns)
