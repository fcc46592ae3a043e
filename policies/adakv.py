"""AdaKV (arXiv 2407.11550): the heads of a layer share its budget by their scores.

A policy within says what each slot of a head is worth. AdaKV takes as many slots of all heads of a
layer together as the heads have budget, the best ones, and counts how many of them each head has.
A head's budget is a mix of that count and of an even share:

    budget = count * (1 - floor) + floor * even share

What the policy within protects, as SnapKV's window, stays in each head and is counted apart: the
rest alone is shared out. The budgets of a layer add up to what they were; where a head holds fewer
slots than its share, as after an earlier prompt, the others get the rest.

Where the sources differ:

* The paper's code rounds each head's budget by itself; here the largest remainders are rounded up,
  so that the sum is exact. Its `floor` is 0.5 in its README and 0.2 in its runs with grouped
  queries; 0.2 is the default here.
* Scores of heads are not normalised before they are compared, an option of KVCache-Factory.
* A head of which nothing is protected keeps one slot at least, which counts as one of the best.
* kvpress takes the best slots of all heads with each head's best `floor` forced in, which gives
  other budgets, and masks what goes. Here memory is freed, of each head what it drops.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from kvprune.errors import KVPruneError
from kvprune.policy import Around, Ranking, SlotView, best_of_all, select


@dataclass(frozen=True, repr=False)
class AdaKV(Around):
    """Gives each head of a layer a budget by what its slots score beside those of the others.

    Args:
        base: a policy that scores the slots of each head by itself, as SnapKV(0.25) or
            ExpectedAttention(0.25, epsilon=0.01).
        floor: the part of its even share that a head has in any case, from 0.0 to 1.0.

    Raises:
        KVPruneError: a floor out of range; a base that ranks no slots or keeps one set for all
            heads; a tensor parallel model, where no process has all heads.
    """

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.floor, (int, float)) and not isinstance(self.floor, bool)
        if not number or not 0 <= self.floor <= 1:
            raise KVPruneError(f"AdaKV: floor={self.floor!r}: expected a number from 0.0 to 1.0")
        if self.base.shares_heads or self.base.sinks_before_window is not None:
            raise self._one_set()

    def rerank(self, slots: SlotView, ranking: Ranking) -> Ranking:
        """The base's ranking with a budget for each head."""
        if slots.group is not None:
            raise KVPruneError(
                f"{self!r} compares all heads of a layer: expected a model that is not tensor "
                f"parallel, where a process has some of them. Use {self.base!r} by itself"
            )
        heads = slots.heads
        if heads == 1:
            return ranking
        if ranking.score.shape[1] == 1:
            raise self._one_set()
        shape = (-1, heads, -1)
        columns, valid = slots.columns.expand(shape), slots.valid.expand(shape)
        protected = valid & ranking.protected
        free = valid & ~protected
        first, count = protected.sum(-1), free.sum(-1)
        even = (ranking.budget.reshape(len(first), -1) - first).clamp(min=0)
        even = even.expand_as(count)
        wanted = even.sum(-1).minimum(count.sum(-1))
        # A head of which nothing is protected keeps its best slot, however poor.
        least = ((first == 0) & (even > 0)).long()
        own = _best_of_each(ranking.score, columns, free, least)
        best = _best_of_all(ranking.score, columns, free, own, wanted)
        budget = _mixed(best, even, float(self.floor), wanted).minimum(count)
        left = wanted - budget.sum(-1)
        if bool(left.any()):
            # Of a head that has no more, the others get the rest, for their next best slots.
            own = _best_of_each(ranking.score, columns, free, budget)
            others = free & ~own
            none = torch.zeros_like(free)
            budget = budget + _best_of_all(ranking.score, columns, others, none, left)
        return Ranking(ranking.score, ranking.protected, first + budget)

    def _one_set(self) -> KVPruneError:
        return KVPruneError(
            f"AdaKV: base={self.base!r} keeps one set for all heads: expected a policy that scores "
            f"the slots of each head by itself, as SnapKV(0.25)"
        )


def _best_of_each(score: Tensor, columns: Tensor, free: Tensor, budget: Tensor) -> Tensor:
    """So many of each head's best free slots, `[B, Hkv, S]` bool; `budget` is `[B, Hkv]`."""
    return free & select(Ranking(score, torch.zeros_like(free), budget), columns, free)


def _best_of_all(
    score: Tensor, columns: Tensor, free: Tensor, first: Tensor, wanted: Tensor
) -> Tensor:
    """How many of the best slots of all heads together each head has, `[B, Hkv]` int64."""
    score, columns, first = (tensor.flatten(1) for tensor in (score, columns, first))
    return best_of_all(score, columns, free.flatten(1), first, wanted).view_as(free).sum(-1)


def _mixed(best: Tensor, even: Tensor, floor: float, wanted: Tensor) -> Tensor:
    """`best * (1 - floor) + floor * even`, `[B, Hkv]`, in whole slots.

    The largest remainders are rounded up, ties in the lower head, until the sum is `wanted` `[B]`.
    """
    share = Fraction(repr(floor)).limit_denominator(10**6)
    parts = best * (share.denominator - share.numerator) + even * share.numerator
    whole, rest = parts // share.denominator, parts % share.denominator
    place = rest.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return whole + (place < (wanted - whole.sum(-1))[:, None])
