"""The one place where a ranking becomes a kept set."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import KVPruneError
from .policy import Ranking, TokenPolicy


def select(ranking: Ranking, columns: Tensor, valid: Tensor) -> Tensor:
    """First the protected, then the best-scored, up to the budget.

    Ties go to the newer column. What is not valid neither counts nor stays. Where the
    protected exceed the budget, the budget is raised to them.

    Args:
        ranking: see `Ranking`.
        columns: `[B, 1|H, S]` int64, unique within a row and head.
        valid: the same shape, bool.

    Returns:
        `[B, H, S]` bool, what stays; H is the largest head axis among the inputs. `valid`
        itself where everything does.
    """
    before, budget = valid, ranking.budget.reshape(ranking.budget.shape[0], -1, 1)
    heads = max(t.shape[1] for t in (columns, valid, ranking.score, ranking.protected, budget))
    columns, valid, score, protected = (
        t.expand(-1, heads, -1) for t in (columns, valid, ranking.score, ranking.protected)
    )
    protected = protected & valid
    # A protected entry is never an excess one, so this raises the budget where needed.
    excess = valid.sum(-1, keepdim=True) - budget
    excess = excess.minimum((valid & ~protected).sum(-1, keepdim=True)).clamp(min=0)
    most = int(excess.max()) if excess.numel() else 0
    if most == 0:
        return before
    if most == 1:
        return _without_worst(score, columns, valid, protected, excess)
    return _without_excess(score, columns, valid, protected, excess)


def _without_worst(
    score: Tensor, columns: Tensor, valid: Tensor, protected: Tensor, excess: Tensor
) -> Tensor:
    """At most one goes per row and head: two reductions instead of a sort."""
    free = valid & ~protected
    lowest = score.masked_fill(~free, torch.inf).amin(-1, keepdim=True)
    # Not `score == lowest`: with a NaN score (not looked for in decoding) one of the free
    # entries goes, never a protected one.
    worst = free & ~(score > lowest)
    oldest = columns.masked_fill(~worst, torch.iinfo(torch.int64).max).argmin(-1, keepdim=True)
    return valid.scatter(-1, oldest, valid.gather(-1, oldest) & (excess == 0))


def _without_excess(
    score: Tensor, columns: Tensor, valid: Tensor, protected: Tensor, excess: Tensor
) -> Tensor:
    """Orders by (protected, score, column), best first, and cuts."""
    order = columns.argsort(dim=-1, descending=True, stable=True)
    for key in (score, valid.long() + protected.long()):
        step = key.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, step)
    count = valid.sum(-1, keepdim=True) - excess
    stays = torch.arange(order.shape[-1], device=order.device) < count
    return torch.zeros_like(valid).scatter(-1, order, stays)


def check_ranking(
    policy: TokenPolicy, ranking: Ranking, columns: Tensor, heads: int, look_for_nan: bool
) -> None:
    """Refuses an answer that `select` could not turn into a kept set.

    Args:
        policy: who answered; named in the error.
        ranking: the answer.
        columns: `[B, 1|heads, S]`, the entries that were ranked.
        heads: how many heads an answer may tell apart (1 for hidden tokens).
        look_for_nan: whether to read the scores, which waits for the device.

    Raises:
        KVPruneError: a wrong type, shape or dtype, or NaN scores.
    """
    if not isinstance(ranking, Ranking):
        raise _wrong(policy, "a kvprune.Ranking or None", f"{type(ranking).__name__}")
    rows, _, size = columns.shape
    axes = sorted({1, heads})
    entries = [torch.Size((rows, h, size)) for h in axes]
    budgets = [torch.Size((rows,)), *(torch.Size((rows, h)) for h in axes)]
    _check_tensor(policy, "score", ranking.score, entries, "float")
    _check_tensor(policy, "protected", ranking.protected, entries, "bool")
    _check_tensor(policy, "budget", ranking.budget, budgets, "int")
    if look_for_nan and bool(ranking.score.isnan().any()):
        raise _wrong(policy, "scores that can be compared", "NaN scores")


def _check_tensor(
    policy: TokenPolicy, name: str, value: Tensor, shapes: list[torch.Size], kind: str
) -> None:
    wanted = f"{name} as a {kind} tensor of shape {' or '.join(str(list(s)) for s in shapes)}"
    if not isinstance(value, Tensor):
        raise _wrong(policy, wanted, f"{type(value).__name__}")
    if value.dtype == torch.bool:
        got = "bool"
    else:
        got = "float" if value.dtype.is_floating_point else "int"
    if got != kind or value.dtype.is_complex or value.shape not in shapes:
        raise _wrong(policy, wanted, f"{value.dtype} of shape {list(value.shape)}")


def _wrong(policy: TokenPolicy, expected: str, came: str) -> KVPruneError:
    return KVPruneError(
        f"{policy!r}: expected {expected}, came {came}. Mend the policy's hook; see kvprune.Ranking"
    )
