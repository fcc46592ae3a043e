"""Hypothesis strategies; a new policy joins the property tests by being listed in POLICIES."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

import kvprune
from kvprune.composition import leaves
from kvprune.policies import H2O, SDTP, SDTPHeads, StreamingLLM

from .models import LAYERS


def sdtp_heads(stages: int = 2, hidden_size: int = 32, **options: Any) -> SDTPHeads:
    """Heads with fixed random weights for the tiny models, before layers 1 and 3."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(stages)
        heads = SDTPHeads(hidden_size, LAYERS, first_layer=1, every=2, stages=stages, **options)
        return heads.double()


@dataclass(frozen=True)
class Listed:
    """A policy as the property tests need to know it.

    make: with a budget of about that many tokens. bound: the most slots a layer may hold
    with that budget; None where the policy does not evict. roomy: with a budget that no
    test reaches.
    """

    name: str
    make: Callable[[int], kvprune.TokenPolicy]
    bound: Callable[[int], int] | None
    roomy: Callable[[], kvprune.TokenPolicy]

    def __repr__(self) -> str:
        return self.name


def sdtp_pruner(keep: float, asking: int = 0) -> SDTP:
    """Two stages, before layers 1 and 3; with `asking` newest tokens in a low-rank term."""
    low_rank = {"query_heads": 2, "query_size": 3, "query_tokens": asking, "window": 3}
    return SDTP(sdtp_heads(**low_rank if asking else {}), keep, sinks=2, min_tokens=6)


POLICIES = [
    Listed(
        "h2o",
        lambda n: H2O(heavy=n // 2, recent=n - n // 2),
        lambda n: n,
        lambda: H2O(heavy=500, recent=500),
    ),
    Listed(
        "h2o-inside",
        lambda n: H2O(heavy=n // 2, recent=n - n // 2, positions="cache"),
        lambda n: n,
        lambda: H2O(heavy=500, recent=500, positions="cache"),
    ),
    Listed("h2o-recent-only", lambda n: H2O(heavy=0, recent=n), lambda n: n, lambda: H2O(0, 500)),
    Listed(
        "streaming",
        lambda n: StreamingLLM(sinks=min(2, n - 1), window=n - min(2, n - 1)),
        lambda n: n,
        lambda: StreamingLLM(sinks=4, window=1000),
    ),
    Listed(
        "streaming-inside",
        lambda n: StreamingLLM(sinks=2, window=max(n - 2, 1), positions="cache"),
        lambda n: max(n, 3),
        lambda: StreamingLLM(sinks=4, window=1000, positions="cache"),
    ),
    Listed(
        "h2o|streaming",
        lambda n: H2O(heavy=n // 2, recent=n - n // 2) | StreamingLLM(sinks=1, window=n),
        lambda n: 2 * n + 1,
        lambda: H2O(heavy=500, recent=500) | StreamingLLM(sinks=1, window=1000),
    ),
    Listed("sdtp", lambda n: sdtp_pruner(0.6), None, lambda: sdtp_pruner(1.0)),
    Listed("sdtp-asked", lambda n: sdtp_pruner(0.6, 3), None, lambda: sdtp_pruner(1.0, 3)),
]

EVICTING = [p for p in POLICIES if p.bound is not None]


def inside(policies: Iterable[kvprune.TokenPolicy]) -> dict[str, Any]:
    """What a policy that stands for others, or stands beside them, answers about positions."""
    parts = list(leaves(policies))
    answers = {p.sinks_before_window for p in parts if "rank_slots" in p.hooks}
    return {
        "positions_in_cache": any(p.positions_in_cache for p in parts),
        "sinks_before_window": answers.pop() if len(answers) == 1 else None,
    }


listed = st.sampled_from(POLICIES)
evicting = st.sampled_from(EVICTING)
budgets = st.integers(2, 12)
# (query heads, key/value heads): multi-head, grouped-query, multi-query.
head_counts = st.sampled_from([(2, 2), (4, 2), (4, 1), (4, 4)])
seeds = st.integers(0, 2**16)


@st.composite
def pipelines(draw: st.DrawFn, most: int = 3) -> tuple[list[Listed], list[int]]:
    """Some listed policies, with a budget each."""
    chosen = draw(st.lists(listed, min_size=0, max_size=most))
    return chosen, [draw(budgets) for _ in chosen]


@st.composite
def evicting_pipelines(draw: st.DrawFn, least: int, most: int) -> list[tuple[Listed, int]]:
    """Some listed policies that evict, with a budget each."""
    chosen = draw(st.lists(evicting, min_size=least, max_size=most))
    return [(p, draw(budgets)) for p in chosen]


@st.composite
def chunked(draw: st.DrawFn, total: int) -> list[int]:
    """A way of cutting `total` tokens into forwards."""
    cuts = draw(st.lists(st.integers(1, total - 1), max_size=3, unique=True)) if total > 1 else []
    edges = [0, *sorted(cuts), total]
    return [b - a for a, b in itertools.pairwise(edges)]
