"""One budget for all layers and heads, by the scores of a policy within.

The best-scored slots of a row stay, wherever they are: heads and layers that have many of them keep
many. It is how KVzip (arXiv 2505.23416) keeps a budget, and what a threshold for the whole model
comes to, as KVzap (arXiv 2601.07891) has one. Scores must mean the same in every layer: KVzap's do,
which are logarithms of one quantity, and so do ExpectedAttention's and SnapKV's, which are
probabilities, as far as they go.

What the policy within protects stays, and a head of which nothing is protected keeps its best slot.
Layers whose queries see a window keep what is in it, and have no part in the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvprune.errors import KVPruneError
from kvprune.policy import Around, Ranking, SlotView, best_of_layers
from kvprune.policy.selection import check_ranking


@dataclass(frozen=True, repr=False)
class GlobalBudget(Around):
    """Keeps the slots of all layers and heads that the policy within scores best.

    The row's budget is the sum of what the policy within gives the heads of all layers.

    Args:
        base: a policy that ranks the slots of a layer, as KVzap(gates, 0.25).

    Raises:
        KVPruneError: a base that ranks no slots, or those of all layers by itself; a tensor
            parallel model, where no process has all heads.
    """

    shares_heads = False
    layers_alike = False
    constant_budget = False
    sinks_before_window = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if "rank_slots" not in self.base.hooks:
            raise KVPruneError(
                f"GlobalBudget: base={self.base!r} shares one budget by itself: expected a policy "
                f"that ranks the slots of one layer, as KVzap(gates, 0.25)"
            )

    @property
    def hooks(self) -> frozenset[str]:
        """The hooks of the policy within, but that it is asked about all layers at once."""
        return self.base.hooks - {"rank_slots"} | {"rank_layers"}

    def rank_layers(self, layers: Sequence[SlotView]) -> list[Ranking | None]:
        """One ranking of all slots of a row, cut where its budget ends."""
        asked, rankings = list[SlotView](), list[Ranking]()
        for view in layers:
            ranking = self.base.rank_slots(view) if view.window is None else None
            if ranking is not None:
                check_ranking(self.base, ranking, view.columns, view.heads)
                asked.append(view)
                rankings.append(ranking)
        found: dict[int, Ranking] = {}
        if asked:
            scores, stays, budgets = [], [], []
            for view, ranking in zip(asked, rankings, strict=True):
                valid = view.valid.expand(-1, view.heads, -1)
                scores.append(ranking.score.expand(valid.shape))
                stays.append(valid & ranking.protected)
                budget = ranking.budget.reshape(len(valid), -1).expand(-1, view.heads)
                # At least what stays in any case, and no more than there is.
                budgets.append(budget.maximum(stays[-1].sum(-1)).minimum(valid.sum(-1)))
            best = best_of_layers(asked, scores, stays, budgets)
            found = dict(zip((view.layer for view in asked), best, strict=True))
        return [found.get(view.layer) for view in layers]
