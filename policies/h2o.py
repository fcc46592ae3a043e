"""H2O: Heavy-Hitter Oracle (arXiv 2306.14048).

Each layer keeps the last `recent` slots and, of the rest, the `heavy` slots that have received
the most attention: the plain sum of the softmax probabilities that all queries so far gave to a
slot, with no decay and no division by age. The prompt attends densely, and then each layer
evicts; afterwards there is one decision per new token.

Where the sources differ:

* The public code has two variants that disagree by one token in what counts as recent. Here
  the kept set after a step is the last `recent` slots, the new token included, and the best
  `heavy` of everything else.
* With grouped-query attention the score of a key/value head is the sum over its query heads.
* With `positions="original"` each token keeps its position in the sequence. With
  `positions="cache"` positions close the gaps that eviction leaves, by row and head, so that a
  stream may run on past the trained context; each step then rotates a copy of all keys, which
  costs O(S D) per layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvprune.policy import Budget, Ranking, SlotView, TokenPolicy, check_positions, split_share
from kvprune.statistics import Attention


@dataclass(frozen=True, repr=False)
class H2O(TokenPolicy):
    """Keeps heavy hitters and the most recent slots, per key/value head.

    Args:
        heavy: how many heavy hitters stay; tokens (int, 0 for none) or a share of the prompt
            (float).
        recent: how many of the newest slots stay, at least 1; tokens (int) or a share of the
            prompt (float).
        positions: "original", or "cache" (for models with RoPE; a `position_ids` that the user
            hands in is then ignored).
        layers: the layers that the policy works on; None for all.

    Raises:
        KVPruneError: an amount that is negative, NaN or, as a float, above 1.0; a `recent` of 0;
            other positions.
    """

    heavy: int | float = 0.1
    recent: int | float = 0.1
    positions: str = "original"

    statistics = (Attention(),)
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
        """A copy with this budget, split in the proportion of `heavy` and `recent`.

        Each part is rounded to tokens by itself.
        """
        heavy, recent = split_share(share, self.heavy, self.recent)
        return replace(self, heavy=heavy, recent=recent)

    @property
    def fixed_budget(self) -> int:
        """The sum of `heavy` and `recent`, of which only amounts in tokens count."""
        return sum(part for part in (self.heavy, self.recent) if isinstance(part, int))

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Ranks slots by their accumulated attention; the newest slots are protected."""
        budget = slots.tokens(self.heavy) + slots.tokens(self.recent)
        return Ranking(slots.statistic(Attention()), slots.newest(self.recent), budget)
