"""Policies are asked here, and held to only reading what they are shown.

A view's tensors are the cache's own, or share its memory. torch counts what is written to a tensor
(`_version`, a number on the host), for all that share memory together: two glances at the counters
find a write without looking at the tensors. Tensors made in inference mode have no counter, but
refuse to be written to outside of it, so there a policy is asked outside of it.

The processes of a tensor parallel model agree on answers that concern all heads here, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import KVPruneError
from .base import TokenPolicy
from .selection import Ranking
from .stored import withheld
from .views import SlotView, TokenView

_FIELDS = ("hidden", "columns", "valid", "first")


def ask(policy: TokenPolicy, hook: str, asked: TokenView | SlotView | list[SlotView]) -> Any:
    """The answer of a policy's hook about a view, or about those of all layers.

    Raises:
        KVPruneError: it wrote into a view.
    """
    # Compiled code knows no counters; the prompt was read without it.
    if torch.compiler.is_compiling():
        return getattr(policy, hook)(asked)
    views = asked if isinstance(asked, list) else [asked]
    shown = [(view, name, tensor) for view in views for name, tensor in shown_by(view)]
    known = [dict(_made(view)).keys() for view in views]
    before = [_version(tensor) for _, _, tensor in shown]
    outside = torch.is_inference_mode_enabled()
    if outside:
        answer = _answer_outside(policy, hook, asked, views[0])
    else:
        answer = getattr(policy, hook)(asked)
    # What was asked for the first time are new tensors, whose counters begin at 0.
    each = zip(views, known, strict=True)
    new = [(view, *made) for view, names in each for made in _made(view) if made[0] not in names]
    for (view, name, tensor), count in zip([*shown, *new], before + [0] * len(new), strict=True):
        if _version(tensor) != count:
            raise _wrote(policy, view, name)
    return answer


def shown_by(view: TokenView | SlotView) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a view, by the names that a policy knows them by."""
    for name in _FIELDS:
        value = getattr(view, name, None)
        if value is not None:
            yield name, value
    for statistic, value in view.statistic.tensors():
        yield f"statistic({statistic!r})", value
    yield "length" if isinstance(view, TokenView) else "prompt_length", view.lengths.tensor
    yield from _made(view)


def _made(view: TokenView | SlotView) -> list[tuple[str, Tensor]]:
    """The tensors that were made when somebody asked for them, in that order."""
    amounts = [(f"tokens({amount})", tokens) for amount, tokens in view.lengths.shared()]
    return amounts if isinstance(view, TokenView) else [*amounts, *view.stored.made.items()]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _answer_outside(policy: TokenPolicy, hook: str, asked: Any, view: TokenView | SlotView) -> Any:
    """The answer outside of inference mode, where torch refuses to write to what was made in it.

    Args:
        policy, hook, asked: see `ask`.
        view: the view, or the first of several, for the error.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            return getattr(policy, hook)(asked)
    except RuntimeError as error:
        if "Inplace update to inference tensor" not in str(error):
            raise
        raise _wrote(policy, view, "one of its tensors") from error


def _wrote(policy: TokenPolicy, view: TokenView | SlotView, what: str) -> KVPruneError:
    return KVPruneError(
        f"{policy!r} wrote into its view at layer {view.layer}: expected a policy that only reads, "
        f"got one that changed {what}. Work on a copy (`.clone()`), or use operators that make a "
        f"new tensor"
    )


def answers_of(policy: TokenPolicy, layers: Sequence[SlotView]) -> list[Ranking | None]:
    """A policy's answers about all layers at once; None for a layer where it does not apply.

    Raises:
        KVPruneError: not an answer for each layer that the policy applies to.
    """
    found: list[Ranking | None] = [None] * len(layers)
    places = [place for place, view in enumerate(layers) if policy.applies(view.layer)]
    if not places:
        return found
    views = [
        replace(view, statistic=view.statistic.only(policy.statistics))
        for view in (layers[place] for place in places)
    ]
    answers = ask(policy, "rank_layers", views)
    if answers is None:
        return found
    if not isinstance(answers, Sequence) or len(answers) != len(views):
        got = f"{len(answers)} of them" if isinstance(answers, Sequence) else repr(answers)
        raise KVPruneError(
            f"{policy!r}: rank_layers: expected a ranking, or None, for each of the {len(views)} "
            f"layers that it was shown, got {got}"
        )
    for place, answer in zip(places, answers, strict=True):
        found[place] = answer
    return found


def answer_of(policy: TokenPolicy, hook: str, view: TokenView | SlotView) -> Ranking | None:
    """A policy's answer where it applies, from the statistics that it named."""
    if not policy.applies(view.layer):
        return None
    shown: dict[str, Any] = {"statistic": view.statistic.only(policy.statistics)}
    if isinstance(view, SlotView) and policy.layers_alike:
        shown["stored"] = withheld(view.heads)
    ranking = ask(policy, hook, replace(view, **shown))
    shared = hook == "rank_hidden" or policy.shares_heads
    if not shared or view.group is None or not isinstance(ranking, Ranking):
        return ranking
    if isinstance(view, SlotView) and view.heads_part:
        return agreed_by_column(ranking, view.group, view.columns, view.seen)
    return agreed(ranking, view.group)


# In a tensor parallel model each process holds some of the heads, and their slots. What it decides
# for a head is its own affair. What enters a layer must come out the same everywhere, or shapes
# part ways; and a policy that keeps one set for all heads of a layer means those of all processes.


def agreed(ranking: Ranking, group: Any) -> Ranking:
    """The ranking that all processes of `group` go by, from each one's own.

    The score is the mean over the processes (of as many heads each); what any protects is
    protected, and the largest budget holds.
    """
    score = ranking.score.clone()
    dist.all_reduce(score, group=group)
    score /= dist.get_world_size(group)
    protected, budget = (_largest(t, group) for t in (ranking.protected, ranking.budget))
    return replace(ranking, score=score, protected=protected.bool(), budget=budget)


def agreed_by_column(ranking: Ranking, group: Any, columns: Tensor, seen: int) -> Ranking:
    """As `agreed`, where heads may hold different tokens, so that processes do, too.

    What a process does not hold it gives a score of 0.

    Args:
        ranking: of one process, the same for a token in all heads that hold it.
        group: the processes.
        columns: `[B, 1|H, S]` int64, of the slots, -1 for none.
        seen: the columns shown so far.
    """
    rows, shape = columns.shape[0], torch.broadcast_shapes(columns.shape, ranking.score.shape)
    # What is not valid goes behind all columns.
    place = columns.expand(shape).flatten(1)
    place = place.where(place >= 0, seen)

    def by_column(value: Tensor) -> Tensor:
        table = value.new_zeros(rows, seen + 1)
        return table.scatter(1, place, value.expand(shape).flatten(1))

    protected = by_column(ranking.protected.long())
    told = replace(ranking, score=by_column(ranking.score), protected=protected)
    told = agreed(told, group)
    score, protected = (t.gather(1, place).view(shape) for t in (told.score, told.protected))
    return replace(told, score=score, protected=protected)


def any_process(found: Tensor, group: Any) -> Tensor:
    """True where some process of `group` found something; `found` is bool."""
    return _largest(found, group).bool()


def _largest(values: Tensor, group: Any) -> Tensor:
    values = values.to(torch.int64, copy=True)
    dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values
