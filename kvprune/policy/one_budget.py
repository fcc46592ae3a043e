"""The base of policies that have one budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from .base import TokenPolicy
from .budget import Budget, split_share


@dataclass(frozen=True, repr=False)
class OneBudget(TokenPolicy):
    """Base of policies whose only amount is what a layer keeps in all, the protected included.

    Args:
        budget: tokens (int) or a share of the prompt (float).
        layers: see `TokenPolicy`.
        when: see `TokenPolicy`.

    Raises:
        KVPruneError: a budget that is not positive, NaN or, as a float, above 1.0.
    """

    budget: int | float = 0.25

    def __post_init__(self) -> None:
        Budget(self.budget, f"{type(self).__name__}: budget")

    def with_budget(self, share: float) -> Self:
        """A copy with this budget."""
        (budget,) = split_share(share, self.budget)
        return replace(self, budget=budget)

    @property
    def fixed_budget(self) -> int:
        """The budget where it is given in tokens; else 0."""
        return self.budget if isinstance(self.budget, int) else 0
