"""Queries of single tokens, which wait for others: nobody who reads a statistic sees that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import kvprune
from kvprune.policies import ExpectedAttention, SnapKV
from kvprune.statistics import QueryMoments, Statistic
from kvprune.storage.waiting import MOST

from ..support.family_models import attached_family
from ..support.models import LAYERS, fresh_model, prompt

TOLD: list[int] = []
"""How many queries `Told` was handed, each time."""


@dataclass(frozen=True)
class Told(Statistic):
    """The columns of all queries, `[B, n]`."""

    per: ClassVar[str] = "layer"
    reads: ClassVar[str] = "queries"

    def join(self, held: tuple[Tensor, ...], new: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        TOLD.append(new[0].shape[2])
        return (torch.cat([*held, new[1]], 1),)


@pytest.fixture(autouse=True)
def _nothing_told():
    TOLD.clear()


def read(model: Any, cache: Any, ids: Tensor, *edges: int) -> None:
    """Has a model read ids in pieces that end there."""
    for start, stop in pairwise((0, *edges)):
        model(ids[:, start:stop], past_key_values=cache)


@pytest.fixture(name="model")
def _model():
    return kvprune.attach(fresh_model(dtype=torch.float64))


def columns_told(cache: Any) -> list[int]:
    """Of the first row, in the first layer."""
    columns: list[int] = cache.layers[0].records[Told()][0][0].tolist()
    return columns


@torch.no_grad()
def test_single_queries_are_told_together(model: Any):
    """A prompt at once; then so many at a time, and what is left when somebody reads."""
    cache, size = kvprune.ComposedCache([], observe=(Told(),)), 6 + 2 * MOST + 5
    read(model, cache, prompt(1, size), *range(6, size + 1))
    assert TOLD == [6] * LAYERS + [MOST] * 2 * LAYERS
    assert columns_told(cache) == list(range(size))
    assert TOLD[-1] == 5


def test_with_gradients_nobody_waits(model: Any):
    """Autograd may have saved what would be joined later."""
    read(model, kvprune.ComposedCache([], observe=(Told(),)), prompt(1, 9), 6, 7, 8, 9)
    assert TOLD == [6] * LAYERS + [1] * 3 * LAYERS


@torch.no_grad()
def test_several_queries_come_behind_what_waits(model: Any):
    """In the order in which tokens were read."""
    cache = kvprune.ComposedCache([], observe=(Told(),))
    with cache.prompt(9):
        read(model, cache, prompt(1, 9), 3, 4, 5, 9)
    assert columns_told(cache) == list(range(9))


@torch.no_grad()
def test_reset_forgets_what_waits(model: Any):
    """The next sequence is told of its own queries alone."""
    cache = kvprune.ComposedCache([], observe=(Told(),))
    read(model, cache, prompt(1, 8), 6, 7, 8)
    cache.reset()
    read(model, cache, prompt(1, 4), 3, 4)
    assert columns_told(cache) == list(range(4))


@pytest.mark.parametrize("how", ["select", "save", "copy", "count bytes"])
@torch.no_grad()
def test_nothing_that_waits_is_lost(model: Any, how: str, tmp_path: Path):
    """Statistics as if they had been joined one by one, which gradients see to."""
    policies = [ExpectedAttention(100, when=64), SnapKV(100, window=9, when=64)]

    def selected(cache: Any) -> Any:
        for _ in range(2):
            cache.batch_select_indices(torch.tensor([1, 0]))
        return cache

    def loaded(cache: Any) -> Any:
        cache.save(tmp_path / "cache")
        return kvprune.ComposedCache.load(tmp_path / "cache", policies, model)

    ways: dict[str, Callable[[Any], Any]] = {
        "select": selected,
        "save": loaded,
        "copy": copy.deepcopy,
        "count bytes": lambda cache: cache if cache.nbytes else None,
    }
    one_by_one, waiting = (kvprune.ComposedCache(policies) for _ in range(2))
    before, after = prompt(2, 11), prompt(2, 3)
    with torch.enable_grad():
        read(model, one_by_one, before, *range(6, 12))
        read(model, one_by_one, after, 1, 2, 3)
    read(model, waiting, before, *range(6, 12))
    waiting = ways[how](waiting)
    read(model, waiting, after, 1, 2, 3)
    for mine, theirs in zip(waiting.layers, one_by_one.layers, strict=True):
        assert len(mine.records) == 2
        for part, held in mine.records.items():
            for got, expected in zip(held, theirs.records[part], strict=True):
                torch.testing.assert_close(got, expected.detach(), rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_what_the_caller_writes_to_changes_nothing(model: Any):
    """A loop of one's own may count up its positions in place."""
    found = []
    for in_place in (True, False):
        cache = kvprune.ComposedCache([], observe=(QueryMoments(0),))
        where, ids = torch.tensor([[0]]), prompt(1, 9)
        for at in range(9):
            given = where if in_place else where.clone()
            model(ids[:, at : at + 1], past_key_values=cache, position_ids=given)
            where += 1
        found.append(cache.layers[1].records[QueryMoments(0)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@dataclass(frozen=True)
class Failing(Told):
    """Cannot be told of single tokens."""

    def join(self, held: tuple[Tensor, ...], new: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        if held:
            raise ValueError("no more")
        return super().join(held, new)


@torch.no_grad()
def test_an_error_comes_whenever_somebody_reads(model: Any):
    """And not once, so that the statistics would then lack what was told."""
    cache = kvprune.ComposedCache([], observe=(Failing(),))
    read(model, cache, prompt(1, 8), 6, 7, 8)
    assert cache.nbytes > 0
    for _ in range(2):
        with pytest.raises(ValueError, match="no more"):
            _ = cache.layers[0].records


@torch.no_grad()
def test_an_error_comes_before_rows_move(model: Any, monkeypatch: Any):
    """So that what was asked for can be asked for again, once its reason is gone."""
    ids, swap = prompt(2, 9), torch.tensor([1, 0])
    cache = kvprune.ComposedCache([], observe=(Failing(),))
    read(model, cache, ids, 6, 7)
    with pytest.raises(ValueError, match="no more"):
        cache.reorder_cache(swap)
    monkeypatch.setattr(Failing, "join", Told.join)
    cache.reorder_cache(swap)
    whole = model(ids[swap][:, :8]).logits[:, -1]
    got = model(ids[swap][:, 7:8], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_queries_of_a_sliding_window_wait_too():
    """Slots that nobody sees any more go without a look at what is held of queries."""
    model = attached_family("gemma2")
    read(model, kvprune.ComposedCache([], observe=(Told(),)), prompt(1, 30), *range(20, 31))
    assert set(TOLD) == {20}


@torch.no_grad()
def test_queries_that_wait_are_no_slices(model: Any):
    """GPT-2 hands in a third of a projection, which would be kept as a whole."""
    model, cache = attached_family("gpt2"), kvprune.ComposedCache([], observe=(Told(),))
    read(model, cache, prompt(1, 8), 6)
    before = cache.nbytes
    read(model, cache, prompt(1, 1), 1)
    (waiting,) = cache.layers[0]._waiting
    assert waiting.queries.untyped_storage().nbytes() == waiting.queries.nbytes
    assert cache.nbytes >= before + LAYERS * waiting.queries.nbytes
