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
* `positions="original"` keeps the positions that tokens came with. `positions="cache"` closes
  the gaps that eviction leaves, by row and head, so that a stream may run on past the trained
  context; each step then turns a copy of all keys, which is O(S D) a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvprune.policy import Budget, Ranking, SlotView, TokenPolicy, check_positions, split_share


@dataclass(frozen=True, repr=False)
class H2O(TokenPolicy):
    """Keeps heavy hitters and the most recent slots, per key/value head.

    Args:
        heavy: how many heavy hitters; tokens (int, 0 for none) or a share of the prompt
            (float).
        recent: how many recent slots, at least 1; tokens or a share of the prompt.
        positions: "original", or "cache" (models with RoPE; a `position_ids` that the user hands
            in is not looked at).
        layers: the layers it works on; None for all.

    Raises:
        KVPruneError: a budget that is negative, NaN, above 1.0 as a float, or `recent`
            below 1; other positions.
    """

    heavy: int | float = 0.1
    recent: int | float = 0.1
    positions: str = "original"

    statistics = ("attention",)
    constant_budget = True
    layers_alike = True

    def __post_init__(self) -> None:
        Budget(self.heavy, "H2O: heavy", least=0)
        Budget(self.recent, "H2O: recent")
        check_positions(self.positions, "H2O")

    @property
    def positions_in_cache(self) -> bool:  # type: ignore[override]
        """Whether positions are assigned inside the cache."""
        return self.positions == "cache"

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
