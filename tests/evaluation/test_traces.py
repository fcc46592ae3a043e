"""What a trace says of a cache that has read a prompt."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import kvprune
from kvprune import KVPruneError
from kvprune.evaluation.ledger.results import Cell, Trace
from kvprune.evaluation.measure.traces import MOST, held, levels, packed, trace_of
from kvprune.policies import H2O, SDTP, StreamingLLM

from ..support.models import LAYERS, prompt, tiny_model
from ..support.strategies import sdtp_heads

CELL = Cell("a@0.5", "a", 0.5, "needle", 64)
POLICIES = [[], [H2O(4, 4)], [StreamingLLM(2, 9)], [SDTP(sdtp_heads(), 0.6, 2, 3, 6), H2O(5, 3)]]


def cache_of(policies: list, length: int = 40, rows: int = 1) -> kvprune.ComposedCache:
    cache = kvprune.ComposedCache(policies)
    with torch.no_grad():
        tiny_model()(prompt(rows, length), past_key_values=cache, logits_to_keep=1)
    return cache


def tokens(count: int) -> list[str]:
    return [f" {i}" for i in range(count)]


@pytest.mark.parametrize("policies", POLICIES, ids=repr)
def test_levels_are_those_of_the_cache(policies):
    """Head by head, column by column; None of it is lost on the way through JSON."""
    cache = cache_of(policies)
    trace = trace_of(cache, tokens(40), CELL, 3)
    assert (trace.cell, trace.sample, trace.tokens) == (CELL, 3, tuple(tokens(40)))
    again = json.loads(json.dumps(asdict(trace)))
    found = levels(Trace(CELL, again["sample"], tuple(again["tokens"]), tuple(again["kept"])))
    assert found.shape == (LAYERS, 40)
    for layer in range(LAYERS):
        heads = [set(head) for head in cache.columns(layer)[0].tolist()]
        for column in range(40):
            share = sum(column in head for head in heads) / len(heads)
            assert found[layer, column] == (MOST if share == 1 else 0 if not share else 2)


@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(0, 70)),
                  elements=st.integers(0, MOST))
)  # fmt: skip
def test_levels_come_back(values):
    """Of any length, also where it is no multiple of eight; layers without slots are left out."""
    kept = tuple(packed(row) for row in values)
    trace = Trace(CELL, 0, tuple(tokens(values.shape[1])), ("", *kept, ""))
    assert np.array_equal(levels(trace), values)
    assert held(trace) == pytest.approx(values.mean(0) / MOST)


def test_fewer_than_half_of_the_heads_are_told_apart():
    """None, a third, two thirds, all."""
    from kvprune.evaluation.measure.traces import _levels

    columns = torch.tensor([[[0, 1, 2], [-1, 0, 1], [-1, -1, 0]]])
    assert _levels(columns, 4).tolist() == [MOST, 2, 1, 0]


def test_a_trace_is_small():
    """2,000 tokens and 30 layers, the worst there is; and what a window leaves."""
    draw = np.random.default_rng(0)
    worst = [packed(draw.integers(0, 4, 2048).astype(np.uint8)) for _ in range(30)]
    assert sum(map(len, worst)) < 21_500
    window = packed(np.repeat([3, 0, 3], [4, 1532, 512]).astype(np.uint8))
    assert 30 * len(window) < 2_000


def test_no_layer_with_slots():
    """Nothing is held."""
    trace = Trace(CELL, 0, ("a", "b"), ("", ""))
    assert levels(trace).shape == (0, 2) and held(trace).tolist() == [0, 0]


def test_what_was_not_just_read_is_refused():
    """Other tokens, more tokens, several rows."""
    cache = cache_of([H2O(4, 4)])
    with pytest.raises(KVPruneError, match=r"39 tokens given.*has read 40"):
        trace_of(cache, tokens(39), CELL, 0)
    with pytest.raises(KVPruneError, match="cache of one row"):
        trace_of(cache_of([], 40, rows=2), tokens(40), CELL, 0)


@pytest.mark.parametrize("damage", ["!", "AAAA", packed(np.zeros(80, np.uint8))])
def test_a_damaged_trace_is_refused(damage):
    """Not base64, not deflated, of another length."""
    trace = trace_of(cache_of([]), tokens(40), CELL, 0)
    with pytest.raises(KVPruneError, match=r"kept columns of 40 tokens.*damaged"):
        levels(replace(trace, kept=(damage,)))
