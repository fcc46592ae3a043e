"""StreamingLLM against the plain-Python oracle, which was written from the paper's maths alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune.policies import StreamingLLM

from ..support.driver import Driver, Oracles, check_each_step
from ..support.models import left_padded, prompt, tiny_model
from ..support.oracles import StreamingOracle, budget_oracle
from ..support.strategies import chunked, head_counts, seeds

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


def test_padding_among_the_first_tokens_uses_up_no_sink():
    """Sinks are a row's first tokens, wherever they stand; the window is of its own size."""
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, [0, 2]] = 0
    cache = kvprune.ComposedCache([StreamingLLM(3, 5)])
    with torch.no_grad():
        tiny_model()(prompt(1, 20), attention_mask=mask, past_key_values=cache)
    assert cache.columns(0)[0, 0].tolist() == [1, 3, 4, 15, 16, 17, 18, 19]


@pytest.mark.parametrize("lengths", [(2, 10), (5, 7), (1, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_row_that_is_padded_between_turns_is_the_row_alone(lengths, positions, where, tmp_path):
    """Beside one whose turns are longer; the first turns may be shorter than there are sinks."""
    model: Any = tiny_model()
    # The third turn pads nobody.
    turns, policy = (5, 12, 3), StreamingLLM(4, 4, positions=positions)
    said = [prompt(1, n, seed) for seed, n in enumerate([*lengths, 3])]
    both = [torch.cat([prompt(1, n, 9), pad(s, n)]) for s, n in zip(said, turns, strict=True)]
    masks = [
        torch.cat([torch.ones(1, n), pad(torch.ones_like(s), n)])
        for s, n in zip(said, turns, strict=True)
    ]
    alone, batch = kvprune.ComposedCache([policy]), kvprune.ComposedCache([policy])
    mask = torch.ones(2, 0)
    with torch.no_grad():
        for one, two, new in zip(said, both, masks, strict=True):
            mask = torch.cat([mask, new], 1)
            expected = model(one, past_key_values=alone).logits[:, -1]
            logits = read(model, two, mask, batch)
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)
        for step in range(12):
            if where == "file" and step == 3:
                batch.save(tmp_path / "cache")
                batch = kvprune.ComposedCache.load(tmp_path / "cache", [policy], model)
            token, mask = prompt(1, 1, step), torch.cat([mask, torch.ones(2, 1)], 1)
            expected = model(token, past_key_values=alone).logits[:, -1]
            two = token.expand(2, 1)
            logits = read(model, two, mask, batch)
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)
            if step == 6:
                batch.batch_select_indices(torch.tensor([1, 1]))
                mask = mask[[1, 1]]


def read(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
    """The second row's last logits, with positions as `generate` hands them in."""
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    return model(ids, **given).logits[1:, -1]


def pad(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Zeros on the left, up to `size`."""
    return torch.nn.functional.pad(tokens, (size - tokens.shape[1], 0))
