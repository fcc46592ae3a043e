"""H2O: Heavy-Hitter Oracle (arXiv 2306.14048).

Keeps the last `recent` slots and, of the rest, the `heavy` ones that have received the most
attention: the plain sum of the softmax probabilities that all queries so far gave them, with
no decay and no division by age. The prompt attends densely and then each layer evicts;
afterwards there is one decision per new token.

Where the sources differ:

* The public code has two variants that disagree by one token in what counts as recent. Here
  the kept set after a step is the last `recent` slots, the new token included, and the best
  `heavy` of everything else.
* With grouped-query attention the score of a key/value head sums over its query heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvprune.policy import Budget, Ranking, SlotView, TokenPolicy, split_share


@dataclass(frozen=True, repr=False)
class H2O(TokenPolicy):
    """Keeps heavy hitters and the most recent slots, per key/value head.

    Args:
        heavy: how many heavy hitters; tokens (int, 0 for none) or a share of the prompt
            (float).
        recent: how many recent slots, at least 1; tokens or a share of the prompt.
        layers: the layers it works on; None for all.

    Raises:
        KVPruneError: a budget that is negative, NaN, above 1.0 as a float, or `recent`
            below 1.
    """

    heavy: int | float = 0.1
    recent: int | float = 0.1

    statistics = ("attention",)
    constant_budget = True
    layers_alike = True

    def __post_init__(self) -> None:
        Budget(self.heavy, "H2O: heavy", least=0)
        Budget(self.recent, "H2O: recent")

    def with_budget(self, share: float) -> H2O:
        """Heavy and recent in the proportion that they have; each is rounded for itself."""
        heavy, recent = split_share(share, self.heavy, self.recent)
        return replace(self, heavy=heavy, recent=recent)

    @property
    def fixed_budget(self) -> int:
        """Heavy and recent, as far as they are tokens."""
        return sum(part for part in (self.heavy, self.recent) if isinstance(part, int))

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Accumulated attention ranks; the newest slots are protected."""
        budget = slots.tokens(self.heavy) + slots.tokens(self.recent)
        return Ranking(slots.statistic("attention"), slots.newest(self.recent), budget)
