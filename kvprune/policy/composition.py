"""Policies together: unions, and what several policies want of the engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import KVPruneError
from ..statistics import Statistic, parts_of
from .asking import answer_of, answers_of
from .base import TokenPolicy
from .budget import split_share
from .selection import Ranking, Selection, check_leaves_some, check_ranking
from .views import SlotView, TokenView


def leaves(policies: Iterable[TokenPolicy]) -> Iterator[TokenPolicy]:
    """The policies with every union opened up, each to be checked by itself."""
    for policy in policies:
        yield from policy.parts if isinstance(policy, Union) else (policy,)


def nested(policies: Iterable[TokenPolicy]) -> Iterator[TokenPolicy]:
    """The policies, those within unions and within other policies too."""
    for policy in leaves(policies):
        yield policy
        yield from nested(p for p in vars(policy).values() if isinstance(p, TokenPolicy))


def judges_apart(policy: TokenPolicy) -> bool:
    """Whether there is a union in a policy, at whatever depth."""
    within = [value for value in vars(policy).values() if isinstance(value, TokenPolicy)]
    return isinstance(policy, Union) or any(judges_apart(each) for each in within)


def evicts(policies: Iterable[TokenPolicy]) -> bool:
    """Whether some policy drops slots."""
    return any(policy.evicts for policy in policies)


def asking_at(policies: Iterable[TokenPolicy], layer: int) -> tuple[TokenPolicy, ...]:
    """The policies that read statistics of this layer.

    Eviction reads its own layer's; pruning reads those of the layer before.
    """
    return tuple(
        policy
        for policy in policies
        if (policy.evicts and policy.applies(layer))
        or ("rank_hidden" in policy.hooks and policy.applies(layer + 1))
    )


def wanted_at(policies: Iterable[TokenPolicy], layer: int) -> tuple[Statistic, ...]:
    """The statistics that are held at this layer because some policy reads them."""
    return parts_of(s for policy in asking_at(policies, layer) for s in policy.statistics)


@dataclass(frozen=True, repr=False)
class Union(TokenPolicy):
    """`a | b`: keeps what either keeps, so its capacity is the sum.

    Each part ranks the same tokens; how many stay may differ per row and head. A part that
    says nothing about a hook, or does not apply to a layer, keeps everything there, and so
    does the union.

    Raises:
        KVPruneError: the parts share no hook, so the union would keep everything.
    """

    parts: tuple[TokenPolicy, ...] = ()

    @classmethod
    def of(cls, *parts: TokenPolicy) -> Union:
        """The union of `parts`; unions among them are opened up."""
        for part in parts:
            if not isinstance(part, TokenPolicy):
                raise KVPruneError(f"a | b: expected two policies, got {part!r}")
        flat = [p for part in parts for p in (part.parts if isinstance(part, cls) else (part,))]
        union = cls(tuple(flat), when=flat[0].when)
        if any(part.when != union.when for part in flat):
            raise KVPruneError(
                f"{union!r}: its parts are asked at different times (when="
                f"{[part.when for part in flat]}): expected parts with the same `when`"
            )
        if not union.hooks:
            raise KVPruneError(
                f"{union!r} would keep everything: its parts share no hook (one prunes hidden "
                f"states, the other evicts slots). Use them as a pipeline: "
                f"ComposedCache([{', '.join(map(repr, flat))}])"
            )
        return union

    @property
    def hooks(self) -> frozenset[str]:
        """The hooks that all parts override."""
        return frozenset.intersection(*(p.hooks for p in self.parts))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The statistics that any part wants observed."""
        return tuple(dict.fromkeys(each for p in self.parts for each in p.statistics))

    def with_budget(self, share: float) -> Union | None:
        """The share split evenly among the parts, so that they keep no more than that together.

        None where a part has no budget, as that may keep anything.
        """
        each = split_share(share, *(1 for _ in self.parts))
        parts = [p.with_budget(s) for p, s in zip(self.parts, each, strict=True)]
        found = tuple(part for part in parts if part is not None)
        return replace(self, parts=found) if len(found) == len(parts) else None

    def for_model(self, model: torch.nn.Module) -> Union:
        """The union of what its parts are on `model`."""
        return replace(self, parts=tuple(part.for_model(model) for part in self.parts))

    def for_tokenizer(self, tokenizer: Any) -> Union:
        """The union of what its parts are with the tokenizer."""
        return replace(self, parts=tuple(part.for_tokenizer(tokenizer) for part in self.parts))

    def rank_hidden(self, tokens: TokenView) -> Ranking | None:
        """Protects what any part keeps."""
        found = self._rankings("rank_hidden", tokens)
        if found is None:
            return None
        columns, valid = tokens.columns[:, None], tokens.valid[:, None]
        return self._either(found, tokens.layer, columns, valid, heads=1)

    def rank_slots(self, slots: SlotView) -> Ranking | None:
        """Protects what any part keeps."""
        found = self._rankings("rank_slots", slots)
        if found is None:
            return None
        heads = slots.heads
        return self._either(found, slots.layer, slots.columns, slots.valid, heads)

    def rank_layers(self, layers: Sequence[SlotView]) -> list[Ranking | None]:
        """Protects what any part keeps."""
        answers = [answers_of(part, layers) for part in self.parts]
        found: list[Ranking | None] = []
        for view, *rankings in zip(layers, *answers, strict=True):
            heads = view.heads
            shape = view.layer, view.columns, view.valid, heads
            all_say = [ranking for ranking in rankings if ranking is not None]
            complete = len(all_say) == len(rankings)
            found.append(self._either(all_say, *shape) if complete else None)
        return found

    def _rankings(self, hook: str, view: TokenView | SlotView) -> list[Ranking] | None:
        found: list[Ranking] = []
        for part in self.parts:
            ranking = answer_of(part, hook, view)
            if ranking is None:
                return None
            found.append(ranking)
        return found

    def _either(
        self, rankings: list[Ranking], layer: int, columns: Tensor, valid: Tensor, heads: int
    ) -> Ranking:
        kept = torch.zeros_like(valid)
        score = torch.zeros_like(valid, dtype=rankings[0].score.dtype)
        for part, ranking in zip(self.parts, rankings, strict=True):
            check_ranking(part, ranking, columns, heads)
            # NaN would rank highest.
            nan = ranking.score.isnan()
            lowest = replace(ranking, score=ranking.score.masked_fill(nan, -torch.inf))
            selection = Selection(lowest, columns, valid)
            check_leaves_some(part, layer, ranking, valid, selection.least_budget)
            kept = kept | selection.kept()
            # A part's NaN must still reach the engine, which looks for it.
            score = score.masked_fill(nan, torch.nan)
        return Ranking(score, kept, kept.sum(-1))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))
