"""What speed and memory come from, counted: operators, FLOPs and bytes, never seconds.

What these numbers guard, `bench.speed` measures. A change that moves one says so by changing it
here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache

import kvprune
from bench.costs.count import entering
from bench.live import LiveBytes
from kvprune.attention.blockwise import BLOCK
from kvprune.evaluation.measure.flops import Flops, counting, own_flops
from kvprune.policies import (
    H2O,
    SDTP,
    TOVA,
    ExpectedAttention,
    ObservedAttention,
    SDTPHeads,
    SnapKV,
    StreamingLLM,
)

from ..support.models import LAYERS, VOCAB, fresh_model, plain_model, prompt, tiny_model
from ..support.opcount import OpCount

C, D, HEADS, KV_HEADS, INNER = 32, 8, 4, 2, 48  # of the tiny model
BUDGET = 20


def sdtp(layers: int = LAYERS) -> SDTP:
    """One stage, before layer 1, which keeps half."""
    return SDTP(SDTPHeads(C, layers, first_layer=1, stages=1), keep=0.5)


def policies(name: str, layers: int = LAYERS) -> list[kvprune.TokenPolicy]:
    """By the name of a row of `OPERATORS`."""
    h2o = H2O(heavy=BUDGET // 2, recent=BUDGET // 2)
    rows: dict[str, list[kvprune.TokenPolicy]] = {
        "no policy": [],
        "StreamingLLM": [StreamingLLM(sinks=4, window=BUDGET - 4)],
        "H2O": [h2o],
        "SDTP + H2O": [sdtp(layers), h2o],
        "TOVA": [TOVA(BUDGET)],
        "ObservedAttention": [ObservedAttention(BUDGET, when=1024)],
        "ExpectedAttention": [ExpectedAttention(BUDGET, when=1024)],
        "SnapKV": [SnapKV(BUDGET, window=8, when=1024)],
    }
    return rows[name]


# Operators of torch (views among them) in a decode step at a full budget, in each layer and in all
# that is in none. Where a change of the engine, of torch or of transformers moves a number, the
# failing test says the new one; `OpCount().calls` of two steps says which operators they are. Write
# it here if it fell, or if what it buys is worth it.
OPERATORS = {
    "dense": (72, 24),
    "no policy": (79, 32),
    "StreamingLLM": (74, 59),
    "H2O": (88, 61),
    "SDTP + H2O": (88, 61),
    "TOVA": (89, 54),
}
# The same of policies that are not asked in the step, where no buffer has to grow.
OPERATORS_BETWEEN = {
    "ObservedAttention": (97, 32),
    "ExpectedAttention": (80, 36),
    "SnapKV": (80, 32),
}


@torch.no_grad()
def operators_of_a_step(model: Any, cache: Cache, steps: int) -> int:
    """After a prompt and some steps."""
    model(prompt(1, 100), past_key_values=cache)
    for _ in range(steps):
        model(prompt(1, 1), past_key_values=cache)
    with OpCount() as ops:
        model(prompt(1, 1), past_key_values=cache)
    return ops.calls.total()


def operators_by_layer(name: str, steps: int) -> tuple[int, int]:
    """Of a step after `steps` others: in each layer, and in none."""
    totals = []
    for layers in (LAYERS - 1, LAYERS):
        model = tiny_model(dtype=torch.float32, num_hidden_layers=layers)
        dense = name == "dense"
        cache = DynamicCache() if dense else kvprune.ComposedCache(policies(name, layers))
        totals.append(operators_of_a_step(model, cache, steps))
    layer = totals[1] - totals[0]
    return layer, totals[1] - LAYERS * layer


def test_attach_hooks_layers_alone():
    """A module with hooks takes torch's slow path, in each step, with any cache."""
    model = kvprune.attach(fresh_model())
    hooked = [name for name, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]
    layers = [f"model.layers.{index}" for index in range(LAYERS)]
    assert hooked == layers
    assert all(len(model.get_submodule(name)._forward_pre_hooks) == 1 for name in hooked)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("steps", [3, 100])
def test_a_step_is_so_many_operators(name: str, steps: int):
    """However long the stream; a layer's are what the fourth one adds."""
    assert operators_by_layer(name, steps) == OPERATORS[name]


@pytest.mark.parametrize("name", OPERATORS_BETWEEN)
def test_a_step_between_evictions_is_so_many_operators(name: str):
    """Queries that nobody reads in the step only wait."""
    assert operators_by_layer(name, steps=3) == OPERATORS_BETWEEN[name]


@pytest.mark.parametrize("count", [1, 70])
def test_attach_adds_no_operator_to_a_dense_cache(count: int):
    """In a prompt as in a step."""
    found = []
    for model in (plain_model(dtype=torch.float32), tiny_model(dtype=torch.float32)):
        with torch.no_grad(), OpCount() as ops:
            model(prompt(1, count), past_key_values=DynamicCache(), logits_to_keep=1)
        found.append(ops.calls)
    assert found[0] == found[1]


def test_a_pruned_prefill_costs_what_its_tokens_cost():
    """torch's counter, our formula, and the paper's arithmetic, to the last FLOP."""
    model, n = tiny_model(dtype=torch.float32), 200
    with (
        counting() as counter,
        entering(model) as entered,
        own_flops() as own,
        torch.no_grad(),
    ):
        model(prompt(1, n), past_key_values=kvprune.ComposedCache([sdtp()]), logits_to_keep=1)
    assert entered == [n, n // 2, n // 2, n // 2]
    assert counter.get_total_flops() == Flops.measured(model).of_prompt(n, entered) + sum(own)
    # 2 a weight and token, 4 a head's entry and pair; the head of the model reads one token.
    weights = 2 * C * HEADS * D + 2 * C * KV_HEADS * D + 3 * C * INNER
    layers = [2 * weights * q + 4 * HEADS * D * q * q for q in entered]
    assert sum(own) == 2 * n * (C * C // 4 + C // 4 * 2)
    assert counter.get_total_flops() == sum(layers) + 2 * C * VOCAB + sum(own)


def live_bytes(tokens: int, make: Callable[[], Cache]) -> int:
    """The most that tensors hold at once while a prompt is read."""
    with torch.no_grad(), LiveBytes() as live:
        tiny_model(dtype=torch.float32)(prompt(1, tokens), past_key_values=make(), logits_to_keep=1)
    return live.peak


@pytest.mark.parametrize("name", ["H2O", "SDTP + H2O"])
def test_h2o_s_prefill_is_linear_in_memory(name: str):
    """Beyond dense it has one buffer, with the scores of a block of queries: nothing n x n."""

    def make() -> Cache:
        return kvprune.ComposedCache(policies(name))

    short, long = (live_bytes(n, make) for n in (1024, 2048))
    assert long <= 2.01 * short
    scores = 4 * HEADS // KV_HEADS * BLOCK * 2048
    assert long - live_bytes(2048, DynamicCache) <= scores < 4 * 2048**2


SLOT = 2 * KV_HEADS * D * 4  # bytes of its keys and values
COLUMN = 8
SPARE = 1  # the slot that the next token takes
HELD = {
    "StreamingLLM": (BUDGET + SPARE) * (SLOT + COLUMN) + COLUMN,
    "H2O": (BUDGET + SPARE) * (SLOT + KV_HEADS * (COLUMN + 4)) + KV_HEADS * COLUMN,
    "SDTP + H2O": (BUDGET + SPARE) * (SLOT + KV_HEADS * (COLUMN + 4)) + KV_HEADS * COLUMN,
}
"""Of one layer: slots with their columns and statistics, and at the end where the hole is."""


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("tokens", [100, 400])
def test_what_is_held_is_what_was_kept_and_one_slot(name: str, tokens: int):
    """However long the prompt was, and the stream; two numbers of each row come on top."""
    model, cache = tiny_model(dtype=torch.float32), kvprune.ComposedCache(policies(name))
    with torch.no_grad():
        model(prompt(1, tokens), past_key_values=cache)
        for _ in range(30):
            model(prompt(1, 1), past_key_values=cache)
            assert cache.nbytes == LAYERS * HELD[name] + 2 * COLUMN
