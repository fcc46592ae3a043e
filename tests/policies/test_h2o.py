"""H2O against the plain-Python oracle, which was written from the paper's maths alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprune.policies import H2O
from kvprune.statistics import Attention

from ..support.driver import Driver, Oracles, Tokens, check_each_step
from ..support.oracles import H2OOracle, budget_oracle
from ..support.strategies import chunked, head_counts, seeds

DECODE = 50


def h2o_oracles(driver: Driver, budgets: list[tuple[int, int]]) -> Oracles:
    """One oracle per row and head; `budgets` are each row's heavy and recent."""
    return Oracles(driver, lambda row: H2OOracle(*budgets[row]))


@given(
    head_counts,
    st.integers(0, 6),
    st.integers(1, 6),
    st.data(),
    seeds,
    st.sampled_from([None, 5, 11]),
)
def test_every_step_equals_the_oracle(heads, heavy, recent, data, seed, window):
    """Prefill in any chunks, left padding, then 50 decode steps: exact sets."""
    length = data.draw(st.integers(1, 30))
    padding = [0, data.draw(st.integers(0, length - 1))]
    driver = Driver([H2O(heavy, recent)], 2, *heads, seed=seed, window=window)
    oracles = h2o_oracles(driver, [(heavy, recent)] * 2)
    steps = data.draw(chunked(length)) + [1] * DECODE
    check_each_step(driver, oracles, steps, padding)


def test_long_prompt_of_several_blocks_equals_the_oracle():
    """More queries than one block of the block-wise attention, with old slots before them."""
    driver = Driver([H2O(20, 10)], 2, 4, 2)
    check_each_step(driver, h2o_oracles(driver, [(20, 10)] * 2), [150, 70, 1, 1, 90, 1], [67, 3])


@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.integers(1, 40), st.integers(0, 20), seeds)
def test_shares_are_of_each_row_s_prompt(heavy, recent, length, padding, seed):
    """Outside `generate` the forwards of several tokens are the prompt."""
    heavy, recent = round(heavy, 2), round(recent, 2)
    length, padding = length + 1, min(padding, length)
    prompts = [length, length - padding]
    driver = Driver([H2O(heavy, recent)], 2, 4, 2, seed=seed)
    budgets = [(budget_oracle(heavy, n), budget_oracle(recent, n)) for n in prompts]
    check_each_step(driver, h2o_oracles(driver, budgets), [length, 1, 1, 1], [0, padding])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_accumulate_in_float32(dtype):
    """Whatever the model's precision; the sums stay within its rounding of the exact ones."""
    driver = Driver([H2O(50, 50)], 1, 4, 2, dtype=dtype, sharpness=1.0)
    exact = Driver([H2O(50, 50)], 1, 4, 2, sharpness=1.0)
    for count in (70, 1, 1):
        tokens = driver.tokens(count)
        driver.step(tokens)
        exact.step(Tokens(tokens.q.double(), tokens.k.double(), tokens.v.double()))
    received = driver.cache.layers[0].statistics[Attention()]
    assert received.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        received.double(), exact.cache.layers[0].statistics[Attention()], rtol=8 * eps, atol=8 * eps
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_are_of_float32_too(dtype):
    """In any precision every query gives 1 in all, to float32's rounding: prompt and decoding."""
    driver, queries = Driver([H2O(200, 200)], 2, 4, 2, dtype=dtype), 0
    for count in (70, 1, 1, 3, *[1] * 20):
        driver.step(driver.tokens(count))
        queries += count
        given = driver.cache.layers[0].statistics[Attention()].sum(-1)
        torch.testing.assert_close(given, torch.full_like(given, 2 * queries), rtol=1e-5, atol=0)


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    head_counts,
    st.integers(0, 5),
    st.integers(1, 5),
    st.integers(2, 40),
    st.data(),
    seeds,
)
def test_in_every_precision_the_oracle_s_choice_within_rounding(
    dtype, heads, heavy, recent, length, data, seed
):
    """The oracle is handed the same rounded numbers, and computes in float64.

    After each step it goes on from what the driver kept: the recent exactly, and heavy ones of
    which none is worse than one that went by more than the precision explains.
    """
    driver = Driver([H2O(heavy, recent)], 2, *heads, seed=seed, dtype=dtype, sharpness=1.0)
    oracles = h2o_oracles(driver, [(500, 500)] * 2)
    padding = [0, data.draw(st.integers(0, length - 1))]
    unit = 8 * torch.finfo(dtype).eps
    for count, pad in [(length, padding), *[(1, [0, 0])] * 12]:
        tokens = driver.tokens(count)
        outputs = driver.step(tokens, pad)
        exact = Tokens(tokens.q.double(), tokens.k.double(), tokens.v.double())
        expected = oracles.step(exact, pad)
        for (row, head), oracle in oracles.each.items():
            mine = slice(head * (heads[0] // heads[1]), (head + 1) * (heads[0] // heads[1]))
            got = outputs[row, pad[row] :, mine].transpose(0, 1).double()
            torch.testing.assert_close(got, expected[row, head], rtol=unit, atol=unit)
            kept, scores = driver.kept(row, head), oracle.scores
            assert kept[-recent:] == oracle.kept[-recent:]
            assert len(kept) == min(heavy + recent, len(oracle.kept))
            gone = [s for column, s in scores.items() if column not in kept]
            worst = min((scores[c] for c in kept[:-recent]), default=float("inf"))
            assert worst >= max(gone, default=0.0) * (1 - unit) - unit
            statistic = driver.statistic(row, head)
            assert statistic == pytest.approx({c: scores[c] for c in kept}, rel=unit, abs=unit)
            # The oracle goes on from here; rounding does not add up.
            slots = oracle.slots
            oracle.slots = {c: (*slots[c][:2], statistic[c]) for c in kept}
