"""SnapKV (arXiv 2404.14469): what the end of the prompt looks at stays.

Once, at the end of a prompt, each head keeps the newest `window` slots and those that their queries
look at most: the mean probability of the `window` newest queries, pooled over neighbouring slots,
as the mean over the query heads of a key/value head.

Where the sources differ:

* The paper's runs have a window of 32, a kernel of 7 and max-pooling, which are the defaults here;
  the class in its code has 64, 5 and average pooling.
* The softmax runs over all slots, causally inside the window; then the window's columns are cut,
  before pooling.
* The paper keeps a set for each query head, and keys repeated for each. Here scores are the mean
  over the query heads of a key/value head, after pooling, and keys are held once.
* The paper adds up what the queries give, AdaKV's code takes the mean: the same order, and the
  scale that `CriticalKV` expects.
* The budget counts the window. Shorter prompts than the budget stay whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvprune.policy import (
    OneBudget,
    Ranking,
    SlotView,
    check_context,
    check_kernel,
    check_window,
    pooled,
)
from kvprune.statistics import Queries


@dataclass(frozen=True, repr=False)
class SnapKV(OneBudget):
    """Keeps the newest slots, and of the others those that the newest queries look at.

    Args:
        budget: what a layer keeps in all, the window included; tokens (int) or a share of the
            prompt (float). A share that is less than the window keeps the window.
        window: how many of the newest queries look, and of the newest slots stay.
        kernel: how many neighbouring slots a score is pooled over, an odd number.
        pooling: "max" or "average".
        when: see `TokenPolicy`; by default at the end of each prompt.
        layers: the layers that the policy works on; None for all.

    Raises:
        KVPruneError: a budget in tokens that has no room beside the window, a window below 1 or
            longer than the model's context, an even kernel, or another pooling.
    """

    window: int = 32
    kernel: int = 7
    pooling: str = "max"
    when: int | str | None = field(default="prompt", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_window(self.window, self.budget, name)
        check_kernel(self.kernel, self.pooling, name)

    @property
    def statistics(self) -> tuple[Queries, ...]:
        """The newest queries."""
        return (Queries(self.window),)

    def for_model(self, model: torch.nn.Module) -> SnapKV:
        """The policy itself; refuses a window that no prompt of this model fills."""
        check_context(self.window, model, type(self).__name__)
        return self

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Ranks slots by what the window's queries give them; the window is protected."""
        window = slots.newest(self.window)
        return Ranking(self._score(slots, window), window, self._budget(slots))

    def _score(self, slots: SlotView, window: Tensor) -> Tensor:
        """`[B, Hkv, S]`."""
        given = slots.looks(self.window).mean(3)
        others = slots.valid & ~window
        return pooled(given, slots.order, others, self.kernel, self.pooling).mean(2)

    def _budget(self, slots: SlotView) -> Tensor:
        """`[B]` tokens."""
        return slots.tokens(self.budget)
