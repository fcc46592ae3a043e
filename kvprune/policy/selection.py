"""The one place where a ranking becomes a kept set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import KVPruneError
from ..models.devices import in_memory


@dataclass(frozen=True)
class Ranking:
    """The answer of a policy: which tokens matter, and how many may stay.

    score: `[B, 1|Hkv, S]` float, higher stays; ties go to the newer column.
    protected: `[B, 1|Hkv, S]` bool, stays first; where there are more of these than the
        budget has room for, the budget is raised to them.
    budget: `[B]` or `[B, 1|Hkv]` int, how many stay in all, the protected included; at least 1,
        or 0 where something is protected, so that something stays in every row and head.

    For hidden tokens S is Q and the head axis is 1.
    """

    score: Tensor
    protected: Tensor
    budget: Tensor

    @classmethod
    def only(cls, chosen: Tensor) -> Ranking:
        """The ranking that keeps a given set, at least one in every row and head.

        Args:
            chosen: `[B, 1|Hkv, S]` bool.
        """
        # The budget is raised to what is protected.
        budget = torch.zeros(chosen.shape[:2], dtype=torch.int64, device=chosen.device)
        return cls(torch.zeros_like(chosen, dtype=torch.float32), chosen, budget)


class Selection:
    """A ranking on its way to a kept set.

    First the protected stay, then the best-scored, up to the budget; ties go to the newer
    column. What is not valid neither counts nor stays. Where the protected exceed the
    budget, the budget is raised to them.

    Args:
        ranking: see `Ranking`.
        columns: `[B, 1|H, S]` int64, unique within a row and head.
        valid: the same shape, bool.

    Attributes:
        nothing_goes: everything valid stays.
        full: something goes in every row and head, so that the budget is then full.
        one_goes: exactly one goes in every row and head, as in decoding at a full budget.
        least_budget: the least of the budgets.
    """

    def __init__(self, ranking: Ranking, columns: Tensor, valid: Tensor) -> None:
        budget = ranking.budget.reshape(ranking.budget.shape[0], -1, 1)
        score, protected = ranking.score, ranking.protected
        heads = max(t.shape[1] for t in (columns, valid, score, protected, budget))
        self._before = valid
        self._columns, self._valid, self._score, protected = (
            t.expand(-1, heads, -1) for t in (columns, valid, score, protected)
        )
        self._free = self._valid & ~protected
        # A protected entry is never an excess one, which raises the budget where needed.
        over = self._valid.sum(-1, keepdim=True) - budget
        self._excess = over.minimum(self._free.sum(-1, keepdim=True)).clamp(min=0)
        numbers = torch.stack([*self._excess.aminmax(), budget.amin().to(self._excess.dtype)])
        least, self._most, self.least_budget = numbers.tolist()
        self.nothing_goes = self._most == 0
        self.full = least > 0
        self.one_goes = least == self._most == 1

    def gone(self) -> Tensor:
        """The entry that goes first, `[B, H, 1]` int64."""
        return first_to_go(self._score, self._free, self._columns)

    def kept(self) -> Tensor:
        """`[B, H, S]` bool, what stays; `valid` itself where everything does."""
        if self.nothing_goes:
            return self._before
        if self._most > 1:
            return self._ordered_kept()
        gone = self.gone()
        return self._valid.scatter(-1, gone, self._valid.gather(-1, gone) & (self._excess == 0))

    def _ordered_kept(self) -> Tensor:
        """The best by (protected, score, column)."""
        count = self._valid.sum(-1, keepdim=True) - self._excess
        if in_memory(self._score):
            # A guess: mostly no two at the edge have one score. Where to look at it waits for
            # nothing, and sorts take ten times as long.
            score = torch.where(self._free, self._score, torch.inf)
            score = torch.where(self._valid, score, -torch.inf)
            kept = (score >= _least_of_best(score, count)) & self._valid
            if bool((kept.sum(-1, keepdim=True) == count).all()):
                return kept
        order = self._columns.argsort(dim=-1, descending=True, stable=True)
        standing = self._valid.long() * 2 - self._free.long()
        for key in (self._score, standing):
            step = key.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
            order = order.gather(-1, step)
        stays = torch.arange(order.shape[-1], device=order.device) < count
        return torch.zeros_like(self._valid).scatter(-1, order, stays)


def _least_of_best(score: Tensor, count: Tensor) -> Tensor:
    """The least of the `count` `[B, H, 1]` largest of `[B, H, S]`: `[B, H, 1]`."""
    fewest, most = torch.stack(count.aminmax()).tolist()
    if fewest == most > 0:
        return score.topk(most, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    best = score.topk(max(most, 1), dim=-1).values
    return torch.where(count > 0, best.gather(-1, (count - 1).clamp(min=0)), torch.inf)


_NEVER = torch.iinfo(torch.int64).max


def first_to_go(score: Tensor, free: Tensor, columns: Tensor) -> Tensor:
    """The free entry with the lowest score, the oldest of these: no sort needed to find it.

    Args:
        score, free, columns: `[B, 1|H, S]` float, bool and int64, some entry free in each row and
            head.

    Returns:
        `[B, 1|H, 1]` int64.
    """
    # `where` and not `masked_fill`, which on a CPU takes ten times as long.
    scores = torch.where(free, score, torch.inf)
    if in_memory(scores):
        # A guess: mostly one has the lowest score. Where to look at it waits for nothing.
        first = scores.argmin(-1, keepdim=True)
        ties = scores <= scores.gather(-1, first)
        if bool((ties.sum(-1) == 1).all()):
            return first
    lowest = scores.amin(-1, keepdim=True)
    # Not `score == lowest`: with a NaN score (not looked for in decoding) one of the free
    # entries goes, never a protected one.
    worst = free & ~(score > lowest)
    return torch.where(worst, columns, _NEVER).argmin(-1, keepdim=True)


def select(ranking: Ranking, columns: Tensor, valid: Tensor) -> Tensor:
    """The kept set of a ranking: the one place where this is decided.

    First the protected stay, then the best-scored, up to the budget; ties go to the newer column.
    What is not valid neither counts nor stays. Where the protected exceed the budget, the budget is
    raised to them.

    Args:
        ranking: what a policy answers.
        columns: `[B, 1|H, S]` int64, unique within a row and head.
        valid: the same shape, bool.

    Returns:
        `[B, H, S]` bool.
    """
    return Selection(ranking, columns, valid).kept()


def check_leaves_some(
    policy: object, layer: int, ranking: Ranking, valid: Tensor, least_budget: int
) -> None:
    """Refuses budgets that leave a row, or one of its heads, with nothing at all.

    Args:
        policy, layer: who answered, and where; named in the error.
        ranking: the answer.
        valid: `[B, 1|H, S]` bool, the entries that were ranked.
        least_budget: `Selection.least_budget`. Only from 0 down is anything read off the device.

    Raises:
        KVPruneError: a budget below 0, or one of 0 with nothing protected.
    """
    if least_budget > 0:
        return
    budget = ranking.budget.reshape(valid.shape[0], -1)
    protected = (valid & ranking.protected).any(-1)
    # A row of nothing but padding has nothing to lose.
    empty = (budget < 0) | ((budget == 0) & valid.any(-1) & ~protected)
    if bool(empty.any()):
        rows = empty.any(-1).nonzero().flatten().tolist()
        raise wrong(
            policy,
            f"at layer {layer} budgets that leave something in every row and head: at least 1, or "
            f"0 where something is protected",
            f"budgets down to {least_budget} in rows {rows}",
        )


def check_ranking(policy: object, ranking: Ranking, columns: Tensor, heads: int) -> None:
    """Refuses an answer that `select` could not turn into a kept set.

    Args:
        policy: who answered; named in the error.
        ranking: the answer.
        columns: `[B, 1|heads, S]`, the entries that were ranked, -1 where not valid.
        heads: how many heads an answer may tell apart (1 for hidden tokens).

    Raises:
        KVPruneError: a wrong type, shape, dtype or device.
    """
    if not isinstance(ranking, Ranking):
        raise wrong(policy, "a kvprune.Ranking or None", f"{type(ranking).__name__}")
    rows, size, axes = columns.shape[0], columns.shape[2], (1, heads)
    entries = [(rows, axis, size) for axis in axes]
    _check_tensor(policy, "score", ranking.score, entries, "float", columns.device)
    _check_tensor(policy, "protected", ranking.protected, entries, "bool", columns.device)
    budgets = [(rows,), *((rows, axis) for axis in axes)]
    _check_tensor(policy, "budget", ranking.budget, budgets, "int", columns.device)


def _check_tensor(
    policy: object,
    name: str,
    value: Tensor,
    shapes: Sequence[tuple[int, ...]],
    kind: str,
    device: torch.device,
) -> None:
    is_tensor = isinstance(value, Tensor)
    if is_tensor and value.shape in shapes and _KINDS.get(value.dtype) == kind:
        if value.device == device:
            return
        raise wrong(policy, f"{name} on {device}, where its view is", str(value.device))
    expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
    got = f"{value.dtype} of shape {list(value.shape)}" if is_tensor else type(value).__name__
    raise wrong(policy, f"{name} as a {kind} tensor of shape {expected}", got)


_KINDS = {
    torch.bool: "bool",
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), "float"),
    **dict.fromkeys((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), "int"),
}
"""The kinds of dtypes; torch knows no order or no arithmetic of others."""


def wrong(policy: object, expected: str, got: str) -> KVPruneError:
    """The error that blames a policy's hook for its answer."""
    return KVPruneError(
        f"{policy!r}: expected {expected}, got {got}. Mend the policy's hook; see kvprune.Ranking"
    )
