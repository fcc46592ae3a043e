"""StreamingLLM against the plain-Python oracle, which was written from the paper's maths alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune.policies import StreamingLLM

from .driver import Driver, Oracles, check_each_step
from .models import left_padded, prompt, tiny_model
from .oracles import StreamingOracle, budget_oracle
from .strategies import chunked, head_counts, seeds

DECODE = 50


@given(
    head_counts,
    st.integers(0, 5),
    st.integers(1, 8),
    st.data(),
    seeds,
    st.sampled_from([None, 5, 11]),
)
def test_every_step_equals_the_oracle(heads, sinks, window, data, seed, sliding):
    """Prefill in any chunks, left padding, then 50 decode steps: exact sets."""
    length = data.draw(st.integers(1, 30))
    padding = [0, data.draw(st.integers(0, length - 1))]
    driver = Driver([StreamingLLM(sinks, window)], 2, *heads, seed=seed, window=sliding)
    oracles = Oracles(driver, lambda row: StreamingOracle(sinks, window, first=padding[row]))
    check_each_step(driver, oracles, data.draw(chunked(length)) + [1] * DECODE, padding)


@given(st.floats(0.01, 1.0), st.integers(1, 40), st.integers(0, 20), seeds)
def test_a_share_is_of_each_row_s_prompt(share, length, padding, seed):
    """Each row keeps its own share, from its own valid tokens."""
    share, length, padding = round(share, 2), length + 1, min(padding, length)
    driver = Driver([StreamingLLM(2, share)], 2, 4, 2, seed=seed)
    first = [0, padding]

    def make(row: int) -> StreamingOracle:
        return StreamingOracle(2, budget_oracle(share, length - first[row]), first[row])

    check_each_step(driver, Oracles(driver, make), [length, 1, 1, 1], first)


def test_padding_stays_padding_where_a_later_forward_hands_in_no_mask():
    """So that a row's sinks stay its own first tokens."""
    ids, kept = prompt(2, 24), []
    mask = left_padded(ids, [0, 9])["attention_mask"]
    for later in (True, False):
        cache = kvprune.ComposedCache([StreamingLLM(3, 5)])
        with torch.no_grad():
            tiny_model()(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
            for stop in range(21, 25):
                now = mask[:, :stop] if later else None
                tiny_model()(ids[:, stop - 1 : stop], attention_mask=now, past_key_values=cache)
        kept.append(cache.columns(0).tolist())
    assert kept[0] == kept[1]
    assert kept[0][1] == [[9, 10, 11, 19, 20, 21, 22, 23]]


def test_a_sink_that_is_padding_leaves_the_window_as_it_is():
    """Sinks are the columns first, first + 1, ...; the window is of its own size."""
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, [0, 2]] = 0
    cache = kvprune.ComposedCache([StreamingLLM(3, 5)])
    with torch.no_grad():
        tiny_model()(prompt(1, 20), attention_mask=mask, past_key_values=cache)
    assert cache.columns(0)[0, 0].tolist() == [1, 3, 15, 16, 17, 18, 19]
