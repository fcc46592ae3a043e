"""Around: the base of policies that change another policy's ranking of slots."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from ..errors import KVPruneError
from ..statistics import Statistic
from .asking import answer_of, answers_of
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
    Its hooks, statistics and budget are those of the whole, and so are its promises, but for
    `constant_budget` and `sinks_before_window` where `rerank` is overridden: say these again if
    they still hold. A subclass that reads keys, values or `layer` says `layers_alike = False`; one
    that wants more observed adds it, as `super().statistics + (mine,)`.

    `layers` and `when` are the base's, and no arguments: they are given to the base.

    Args:
        base: the policy within, which ranks slots; `a | b` is one too.

    Raises:
        KVPruneError: a base that is no policy or ranks no slots.
    """

    base: TokenPolicy
    layers: Collection[int] | None = field(default=None, init=False, repr=False)
    when: int | str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.base, TokenPolicy) or not self.base.evicts:
            raise KVPruneError(
                f"{type(self).__name__}: base={self.base!r}: expected a policy that ranks slots, "
                f"as SnapKV(0.25)"
            )
        self._follow(self.base)

    def _follow(self, base: TokenPolicy) -> None:
        """Takes over the base, and all that holds for it unless the class says otherwise."""
        inside = any(part.positions_in_cache for part in leaves([base]))
        taken: dict[str, Any] = {name: getattr(base, name) for name in ("layers", "when")}
        promises = {name: getattr(base, name) for name in _PROMISES} | {
            "positions_in_cache": inside
        }
        if type(self).rerank is not Around.rerank:
            # Promises about what is kept, which is another answer's now.
            promises |= {"constant_budget": False, "sinks_before_window": None}
        kinds = type(self).__mro__
        says = set[str]().union(*(vars(kind) for kind in kinds[: kinds.index(Around)]))
        taken |= {name: value for name, value in promises.items() if name not in says}
        for name, value in {"base": base, **taken}.items():
            object.__setattr__(self, name, value)

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
            check_ranking(self.base, ranking, slots.columns, slots.heads)
        return self.rerank(slots, ranking)

    def rank_layers(self, layers: Sequence[SlotView]) -> list[Ranking | None]:
        """Asks the base about all layers, and answers each with `rerank`."""
        found = answers_of(self.base, layers)
        for place, (view, ranking) in enumerate(zip(layers, found, strict=True)):
            if ranking is not None:
                check_ranking(self.base, ranking, view.columns, view.heads)
                found[place] = self.rerank(view, ranking)
        return found

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
        """The slots that the base keeps whatever the prompt's length."""
        return self.base.fixed_budget

    def with_budget(self, share: float) -> Self | None:
        """The same around the base with this budget; None where the base has none."""
        base = self.base.with_budget(share)
        return None if base is None else self._around(base)

    def for_model(self, model: torch.nn.Module) -> Self:
        """The same around what the base is on `model`."""
        return self._around(self.base.for_model(model))

    def for_tokenizer(self, tokenizer: Any) -> Self:
        """The same around what the base is with the tokenizer."""
        return self._around(self.base.for_tokenizer(tokenizer))

    def applies(self, layer: int) -> bool:
        """Whether the base ranks at this layer."""
        return super().applies(layer) and self.base.applies(layer)

    def is_due(self, moment: Moment) -> bool:
        """Whether the base is asked at this moment."""
        return self.base.is_due(moment)

    def _around(self, base: TokenPolicy) -> Self:
        if base is self.base:
            return self
        twin = copy.copy(self)
        twin._follow(base)
        return twin
