"""AdaKV (arXiv 2407.11550): the heads of a layer share its budget by their scores.

A policy within says what each slot of a head is worth. AdaKV takes as many slots of all heads of a
layer together as the heads have budget, the best ones, and counts how many of them each head has.
A head's budget is a mix of that count and of an even share:

    budget = count * (1 - floor) + floor * even share

What the policy within protects, as SnapKV's window, stays in each head and is counted apart: the
rest alone is shared out. The budgets of a layer add up to what they were.

Where the sources differ:

* The paper's code rounds each head's budget by itself; here the largest remainders are rounded up,
  so that the sum is exact. Its `floor` is 0.5 in its README and 0.2 in its runs with grouped
  queries; 0.2 is the default here.
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
from kvprune.policy import Around, Ranking, SlotView, select


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
                f"{self!r} compares all heads of a layer, and a process of a tensor parallel model "
                f"has some of them: expected a model that is not tensor parallel. Use the policy "
                f"within by itself, {self.base!r}"
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
        first = protected.sum(-1)
        even = ranking.budget.reshape(len(first), -1) - first
        even = even.clamp(min=0).minimum(free.sum(-1))
        # A head of which nothing is protected keeps its best slot, however poor.
        one = torch.ones_like(first)
        own = select(Ranking(ranking.score, torch.zeros_like(free), one), columns, free)
        own = own & ((first == 0) & (even > 0))[..., None]
        count = _best(ranking.score, columns, free, own, even.sum(-1))
        return Ranking(ranking.score, ranking.protected, first + _mixed(count, even, self.floor))

    def _one_set(self) -> KVPruneError:
        return KVPruneError(
            f"AdaKV: base={self.base!r} keeps one set for all heads: expected a policy that scores "
            f"the slots of each head by itself, as SnapKV(0.25)"
        )


def _best(score: Tensor, columns: Tensor, free: Tensor, own: Tensor, wanted: Tensor) -> Tensor:
    """How many of a layer's best slots each head has.

    Args:
        score, columns, free: `[B, Hkv, S]`; ties go to the newer column, then to the lower head.
        own: the same shape, those of the free slots that count first.
        wanted: `[B]` int64, the best slots of all heads together.

    Returns:
        `[B, Hkv]` int64.
    """
    order = columns.flatten(1).argsort(dim=-1, descending=True, stable=True)
    for key in (score.flatten(1), (free.byte() + own.byte()).flatten(1)):
        step = key.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, step)
    taken = torch.arange(order.shape[-1], device=order.device) < wanted[:, None]
    return torch.zeros_like(taken).scatter(-1, order, taken).view_as(free).sum(-1)


def _mixed(count: Tensor, even: Tensor, floor: float) -> Tensor:
    """`count * (1 - floor) + floor * even`, `[B, Hkv]`, in whole slots with the sum of `even`."""
    share = Fraction(repr(floor)).limit_denominator(10**6)
    parts = count * (share.denominator - share.numerator) + even * share.numerator
    whole, rest = parts // share.denominator, parts % share.denominator
    # The largest remainders are rounded up, ties in the lower head.
    left = even.sum(-1, keepdim=True) - whole.sum(-1, keepdim=True)
    order = rest.argsort(dim=-1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return whole + (place < left)
