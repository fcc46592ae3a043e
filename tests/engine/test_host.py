"""A decode step waits for nothing: what it has to know of budgets, the host knows already."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import kvprune
from kvprune.policies import H2O, StreamingLLM
from kvprune.statistics import Gate

from ..support.models import fresh_model, left_padded, prompt

FIXED = {
    "dense": [],
    "H2O": [H2O(4, 4)],
    "H2O, shares": [H2O(0.3, 0.2)],
    "StreamingLLM": [StreamingLLM(2, 6)],
    "by layers": [H2O(4, 4, layers=[0, 2]), StreamingLLM(2, 6, layers=[1, 3])],
}


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("policies", FIXED.values(), ids=FIXED)
def test_a_decode_step_reads_nothing_off_the_device(policies, padding):
    """On fake tensors, which have nothing to read: right after the prompt, and later."""
    model, ids, cache = (
        kvprune.attach(fresh_model()),
        prompt(2, 24),
        kvprune.ComposedCache(policies),
    )
    mask = left_padded(ids[:, :20], [0, padding])["attention_mask"] if padding else None
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache, attention_mask=mask)
        for i in range(20, 24):
            _on_fake_tensors(model, ids[:, i : i + 1], cache)
            model(ids[:, i : i + 1], past_key_values=cache)


def test_nor_does_a_gate():
    """Its numbers are looked at in prompts alone."""
    model, ids = kvprune.attach(fresh_model()), prompt(1, 24)
    cache = kvprune.ComposedCache([StreamingLLM(2, 6)], observe=(Gate(First()),))
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        for i in range(20, 24):
            _on_fake_tensors(model, ids[:, i : i + 1], cache)
            model(ids[:, i : i + 1], past_key_values=cache)


class First(nn.Module):
    """Says the first number of each hidden state."""

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        return hidden[None, ..., 0].transpose(0, 1)


def test_a_union_is_read_off_the_device():
    """Its budget is not constant; also, the test above can fail."""
    model, ids = kvprune.attach(fresh_model()), prompt(1, 21)
    cache = kvprune.ComposedCache([H2O(4, 4) | StreamingLLM(2, 6)])
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(DataDependentOutputException):
            _on_fake_tensors(model, ids[:, 20:], cache)


def _on_fake_tensors(model, token, cache):
    twin = copy.deepcopy(cache)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(token, past_key_values=twin)


@pytest.mark.parametrize(
    ("policy", "before", "after"), [(H2O(0.2, 0.2), 8, 10), (StreamingLLM(2, 0.3), 8, 9)], ids=repr
)
def test_a_prompt_of_one_token_raises_a_share(policy, before, after):
    """A later turn of single tokens makes the prompt longer, and with it a budget that was full."""
    model, ids, cache = (
        kvprune.attach(fresh_model()),
        prompt(1, 32),
        kvprune.ComposedCache([policy]),
    )
    model.generate(ids[:, :20], cache=cache, max_new_tokens=4, min_new_tokens=4)
    assert cache.columns(0).shape[-1] == before
    for i in range(20, 23):
        mask = torch.ones(1, cache.seen + 1, dtype=torch.long)
        turn = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4}
        model.generate(ids[:, i : i + 1], cache=cache, **turn)
    assert cache.columns(0).shape[-1] == after


def test_a_row_that_is_handed_padding_is_a_token_short():
    """It then has no slot to give up for the next token."""
    model, ids = kvprune.attach(fresh_model()), prompt(2, 24)
    cache = kvprune.ComposedCache([StreamingLLM(2, 6)])
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 20] = 0
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        cache.enter_generate()
        for i in range(20, 24):
            model(ids[:, i : i + 1], past_key_values=cache, attention_mask=mask[:, : i + 1])
    rows = cache.columns(0)[:, 0].tolist()
    assert rows == [[0, 1, *range(18, 24)], [0, 1, 17, 18, 19, 21, 22, 23]]
