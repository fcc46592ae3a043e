"""Around: the base of policies that change another policy's ranking of slots."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from ..errors import KVPruneError
from ..statistics import Statistic
from .asking import answer_of
from .base import TokenPolicy
from .composition import leaves
from .moment import Moment
from .selection import Ranking, check_ranking
from .views import SlotView, TokenView

_PROMISES = ("shares_heads", "sinks_before_window", "constant_budget", "layers_alike")


@dataclass(frozen=True, repr=False)
class Around(TokenPolicy):
    """A policy around a policy: override `rerank`, which is handed what the base answers.

    The base is asked as it would be by itself: at its layers, when it says, with its statistics.
    Its hooks, statistics, promises and budget are those of the whole. A subclass that reads more
    than the base overrides what the base promises too much of, as `layers_alike = False` where it
    reads keys, and adds statistics as `super().statistics + (mine,)`.

    Args:
        base: the policy within, which ranks slots; `a | b` is one too.
        layers: the base's; an own value is refused.
        when: the base's; an own value is refused.

    Raises:
        KVPruneError: a base that is no policy or ranks no slots, or layers or a `when` of its own.
    """

    base: TokenPolicy
    layers: Collection[int] | None = field(default=None, kw_only=True, repr=False)
    when: int | str | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        name, base = type(self).__name__, self.base
        if not isinstance(base, TokenPolicy) or "rank_slots" not in base.hooks:
            raise KVPruneError(
                f"{name}: base={base!r}: expected a policy that ranks slots, as SnapKV(0.25)"
            )
        for field_name in ("layers", "when"):
            own, of_base = getattr(self, field_name), getattr(base, field_name)
            if own not in (None, of_base):
                raise KVPruneError(
                    f"{name}: {field_name}={own!r}: expected none, as the base's holds "
                    f"({of_base!r}). Give it to the base"
                )
            object.__setattr__(self, field_name, of_base)
        kinds = type(self).__mro__
        says = set[str]().union(*(vars(kind) for kind in kinds[: kinds.index(Around)]))
        inside = any(part.positions_in_cache for part in leaves([base]))
        promises = {name: getattr(base, name) for name in _PROMISES}
        for promise, value in (promises | {"positions_in_cache": inside}).items():
            if promise not in says:
                object.__setattr__(self, promise, value)

    def rerank(self, slots: SlotView, ranking: Ranking) -> Ranking | None:
        """Ranks a layer's slots, given the base's ranking of them.

        Args:
            slots: what the base was shown, with the statistics that the whole names.
            ranking: what the base answered, checked.

        Returns:
            the ranking that counts; None to keep everything.
        """
        return ranking

    def rank_hidden(self, tokens: TokenView) -> Ranking | None:
        """Answers as the base does."""
        return answer_of(self.base, "rank_hidden", tokens)

    def rank_slots(self, slots: SlotView) -> Ranking | None:
        """Asks the base, and answers with `rerank`; None where the base says nothing."""
        ranking = answer_of(self.base, "rank_slots", slots)
        if ranking is None:
            return None
        # Of layers that are asked together the heads are not shown: the engine looks alone.
        if not self.base.layers_alike:
            check_ranking(self.base, ranking, slots.columns, slots.keys.shape[1])
        return self.rerank(slots, ranking)

    @property
    def hooks(self) -> frozenset[str]:
        """The hooks that the base overrides."""
        return self.base.hooks

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What the base wants observed."""
        return self.base.statistics

    @property
    def fixed_budget(self) -> int:
        """The base's."""
        return self.base.fixed_budget

    def with_budget(self, share: float) -> Self | None:
        """The same around the base with this budget; None where the base has none."""
        base = self.base.with_budget(share)
        return None if base is None else self._around(base)

    def for_model(self, model: torch.nn.Module) -> Self:
        """The same around what the base is on `model`."""
        return self._around(self.base.for_model(model))

    def applies(self, layer: int) -> bool:
        """Where the base does."""
        return self.base.applies(layer)

    def is_due(self, moment: Moment) -> bool:
        """When the base is."""
        return self.base.is_due(moment)

    def _around(self, base: TokenPolicy) -> Self:
        changed: dict[str, Any] = {"base": base, "layers": None, "when": None}
        return replace(self, **changed)
