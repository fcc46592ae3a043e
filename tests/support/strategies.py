"""Hypothesis strategies; a new policy joins the property tests by being listed in POLICIES."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st

import kvprune
from kvprune.policies import (
    DMS,
    H2O,
    RKV,
    SDTP,
    TOVA,
    AdaKV,
    ChunkKV,
    CriticalKV,
    DuoAttention,
    ExpectedAttention,
    FastKV,
    KeyDiff,
    Knorm,
    ObservedAttention,
    PyramidKV,
    Random,
    SDTPHeads,
    SnapKV,
    StreamingLLM,
)
from kvprune.testing.runs import STORES, Case

from .models import LAYERS
from .uneven import Threshold


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
    after a forward in which the policy was asked; None where it does not evict. roomy: with a
    budget that no test reaches. budgeted: it has an amount, which `with_budget` sets. even: each
    head of a layer keeps that amount. of_model: it reads the model itself, so that a driver of one
    layer has nothing for it.
    """

    name: str
    make: Callable[[int], kvprune.TokenPolicy]
    bound: Callable[[int], int] | None
    roomy: Callable[[], kvprune.TokenPolicy]
    budgeted: bool = True
    even: bool = True
    of_model: bool = False

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
    Listed(
        "snapkv",
        lambda n: SnapKV(n, window=min(3, n - 1), kernel=3),
        lambda n: n,
        lambda: SnapKV(500, window=3),
    ),
    Listed(
        "snapkv-always",
        lambda n: SnapKV(n, window=1, kernel=1, pooling="average", when=None),
        lambda n: n,
        lambda: SnapKV(500, when=None),
    ),
    Listed(
        "pyramidkv",
        lambda n: PyramidKV(n, window=1, kernel=3, beta=4),
        lambda n: 2 * n,
        lambda: PyramidKV(900, window=3, beta=2),
    ),
    Listed("tova", lambda n: TOVA(n), lambda n: n, lambda: TOVA(500)),
    Listed("knorm", lambda n: Knorm(n), lambda n: n, lambda: Knorm(500)),
    Listed("knorm-always", lambda n: Knorm(n, when=None), lambda n: n, lambda: Knorm(500)),
    Listed("keydiff", lambda n: KeyDiff(n, when=None), lambda n: n, lambda: KeyDiff(500)),
    Listed("random", lambda n: Random(n, when=3), lambda n: n, lambda: Random(500)),
    Listed(
        "observed",
        lambda n: ObservedAttention(n, when="first"),
        lambda n: n,
        lambda: ObservedAttention(500),
    ),
    Listed(
        "observed-always",
        lambda n: ObservedAttention(n, when=None),
        lambda n: n,
        lambda: ObservedAttention(500),
    ),
    Listed(
        "expected",
        lambda n: ExpectedAttention(n, sinks=1, future=16, epsilon=0.02),
        lambda n: n,
        lambda: ExpectedAttention(500),
    ),
    Listed(
        "expected-always",
        lambda n: ExpectedAttention(n, sinks=0, future=5, when=None),
        lambda n: n,
        lambda: ExpectedAttention(500, when=None),
    ),
    Listed(
        "threshold",
        lambda n: Threshold(1 / n, recent=2),
        lambda n: 1000,
        lambda: Threshold(0.0),
        budgeted=False,
    ),
    Listed(
        "around",
        lambda n: kvprune.Around(TOVA(n)),
        lambda n: n,
        lambda: kvprune.Around(TOVA(500)),
    ),
    Listed(
        "adakv",
        lambda n: AdaKV(SnapKV(n, window=min(3, n - 1), kernel=3)),
        lambda n: 1000,
        lambda: AdaKV(SnapKV(500, window=3)),
        even=False,
    ),
    Listed(
        "adakv-always",
        lambda n: AdaKV(H2O(heavy=n - n // 2, recent=n // 2), floor=0.5),
        lambda n: 1000,
        lambda: AdaKV(H2O(heavy=500, recent=500)),
        even=False,
    ),
    Listed(
        "criticalkv",
        lambda n: CriticalKV(SnapKV(n, window=min(3, n - 1), kernel=3)),
        lambda n: n,
        lambda: CriticalKV(SnapKV(500, window=3)),
        even=False,
        of_model=True,
    ),
    Listed(
        "chunkkv",
        lambda n: ChunkKV(Knorm(n, when=None), size=3),
        lambda n: n,
        lambda: ChunkKV(SnapKV(500, window=3)),
        even=False,
    ),
    Listed(
        "duoattention",
        lambda n: DuoAttention(
            {layer: [0] * (layer % 2) for layer in range(LAYERS)}, sinks=min(2, n - 1), recent=n - 1
        ),
        lambda n: 1000,
        lambda: DuoAttention({layer: [0] for layer in range(LAYERS)}, recent=500),
        budgeted=False,
        of_model=True,
    ),
    Listed(
        "rkv",
        lambda n: RKV(n, window=min(2, n - 1), kernel=3, similar=0.2, when=3),
        lambda n: n,
        lambda: RKV(500),
    ),
    Listed(
        "dms",
        lambda n: DMS(Knorm(1, when=None), -2.5, window=n),
        lambda n: 1000,
        lambda: DMS(Knorm(1, when=None), -1000.0),
        budgeted=False,
        even=False,
    ),
    Listed(
        "fastkv",
        lambda n: FastKV(0.6, layer=2, window=3, kernel=3),
        None,
        lambda: FastKV(1.0, layer=1),
    ),
    Listed("sdtp", lambda n: sdtp_pruner(0.6), None, lambda: sdtp_pruner(1.0)),
    Listed("sdtp-asked", lambda n: sdtp_pruner(0.6, 3), None, lambda: sdtp_pruner(1.0, 3)),
]

# `--policy NAME` (see conftest.py): that one alone.
CHOSEN = os.environ.get("KVPRUNE_TEST_POLICY")
if CHOSEN is not None:
    NAMES = [p.name for p in POLICIES]
    POLICIES = [p for p in POLICIES if p.name == CHOSEN]
    if not POLICIES:
        raise pytest.UsageError(f"--policy {CHOSEN}: expected one of {', '.join(NAMES)}")

EVICTING = [p for p in POLICIES if p.bound is not None]
SILENT = [p for p in POLICIES if not p.roomy().statistics]


def sampled(policies: list[Listed], why: str) -> st.SearchStrategy[Listed]:
    """One of them; a test that there is none for is skipped."""
    if policies:
        return st.sampled_from(policies)
    return st.builds(lambda: pytest.skip(f"--policy {CHOSEN}: {why}"))


listed = st.sampled_from(POLICIES)
evicting = sampled(EVICTING, "the policy does not evict")
budgets = st.integers(2, 12)
# (query heads, key/value heads): multi-head, grouped-query, multi-query.
head_counts = st.sampled_from([(2, 2), (4, 2), (4, 1), (4, 4)])
seeds = st.integers(0, 2**16)


@st.composite
def pipelines(
    draw: st.DrawFn, most: int = 3, always: bool = False
) -> tuple[list[Listed], list[int]]:
    """Some listed policies, with a budget each; with `always` such as every forward asks."""
    each = listed.filter(lambda p: p.make(6).when is None) if always else listed
    chosen = draw(st.lists(each, min_size=0, max_size=most))
    return chosen, [draw(budgets) for _ in chosen]


@st.composite
def evicting_pipelines(draw: st.DrawFn, least: int, most: int) -> list[tuple[Listed, int]]:
    """Some listed policies that evict, with a budget each."""
    chosen = draw(st.lists(evicting, min_size=least, max_size=most))
    return [(p, draw(budgets)) for p in chosen]


stores = st.sampled_from(STORES)


@st.composite
def chunked(draw: st.DrawFn, total: int) -> list[int]:
    """A way of cutting `total` tokens into forwards."""
    cuts = draw(st.lists(st.integers(1, total - 1), max_size=3, unique=True)) if total > 1 else []
    edges = [0, *sorted(cuts), total]
    return [b - a for a, b in itertools.pairwise(edges)]


@st.composite
def cases(
    draw: st.DrawFn,
    families: st.SearchStrategy[str],
    later: bool = True,
    heads: st.SearchStrategy[tuple[int, int]] = st.just((4, 2)),  # noqa: B008
) -> Case:
    """A prompt in some forwards; with `later` single tokens, another turn and single ones."""
    steps = draw(chunked(draw(st.integers(2, 24)))) if later else [draw(st.integers(2, 30))]
    padding = [draw(st.integers(0, steps[0] - 1)) for _ in range(2)]
    padding[0] = padding[0] if later else 0
    steps += [1, 1, draw(st.integers(2, 7)), 1, 1] if later else []
    family, seed = draw(families), draw(seeds)
    how = draw(heads), draw(stores), draw(st.booleans())
    return Case(tuple(steps), (padding[0], padding[1]), family, seed, *how)
