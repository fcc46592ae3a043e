"""What runs on a GPU without flash-attn, on the CPU: sdpa, then the mass from log-sum-exp."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvprune
from kvprune.attention import dispatch as attention
from kvprune.attention import fused
from kvprune.attention import received as in_torch
from kvprune.policies import H2O
from kvprune.statistics import Attention

from ..support.models import fresh_model, prompt, tiny_model
from ..support.opcount import OpCount
from ..support.turns import POLICIES, STEPS, assert_same, follow, on_the_cpu


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    """Attention takes the way that it takes on CUDA."""
    monkeypatch.setattr(in_torch, "on_gpu", lambda tensor: True)


@pytest.fixture
def no_blocks(monkeypatch) -> None:
    """The CPU's way fails."""
    monkeypatch.setattr(attention, "block_by_block", None)


@pytest.mark.parametrize("masked", [1, 900, 1 << 26])
@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("name", ["H2O", "SDTP + H2O"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt_neox"])
def test_every_step_is_that_of_the_cpu(family, name, padding, masked, as_on_a_gpu, monkeypatch):
    """Blocks of one query, of a few and of all."""
    monkeypatch.setattr(fused, "MASKED", masked)
    expected = on_the_cpu(family, POLICIES[name](), STEPS, [0, padding])
    monkeypatch.setattr(attention, "block_by_block", None)
    assert_same(follow(tiny_model(family), POLICIES[name](), STEPS, [0, padding]), expected)


def test_drafts_are_attended_to_one_by_one(as_on_a_gpu, no_blocks):
    """Prompt lookup gives the tokens of plain decoding."""
    model: Any = tiny_model()
    ids = prompt(1, 12).repeat(1, 3)
    tokens = [
        model.generate(
            ids, cache=kvprune.ComposedCache([H2O(4, 7)]), max_new_tokens=12, do_sample=False,
            prompt_lookup_num_tokens=lookup,
        )
        for lookup in (None, 4)
    ]  # fmt: skip
    assert torch.equal(*tokens)


def test_chunks_sinks_and_soft_caps_go_block_by_block(as_on_a_gpu):
    """What no kernel of ours knows; the numbers are the CPU's, bit for bit."""
    for family, options in (
        ("llama4_text", {"attention_chunk_size": 9, "head_dim": 8, "num_local_experts": 2}),
        ("gpt_oss", {"backend": "eager", "head_dim": 8, "sliding_window": 9}),
        ("gemma2", {"backend": "eager", "head_dim": 8, "sliding_window": 9}),
    ):
        options["dtype"] = torch.float32
        expected = on_the_cpu(family, [H2O(4, 7)], STEPS, [0, 5], **options)
        got = follow(tiny_model(family, **options), [H2O(4, 7)], STEPS, [0, 5])
        if family != "llama4_text":
            assert torch.equal(got[0], expected[0])
        assert_same(got, expected, rtol=1e-4)


def test_gradients_reach_the_output_and_not_the_statistic(as_on_a_gpu, no_blocks):
    """Training, with sdpa's own dropout."""
    model = kvprune.attach(fresh_model(attention_dropout=0.5)).train()
    caches = [kvprune.ComposedCache([H2O(99, 99)]) for _ in range(2)]
    logits = [model(prompt(1, 30), past_key_values=cache).logits for cache in caches]
    logits[0].sum().backward()
    assert not torch.equal(*logits)
    received = [cache.layers[0].statistics[Attention()] for cache in caches]
    torch.testing.assert_close(*received)
    assert not received[0].requires_grad
    assert model.get_input_embeddings().weight.grad.isfinite().all()


@pytest.mark.parametrize("padding", [0, 300])
def test_nothing_n_by_n_of_ours(padding, as_on_a_gpu, no_blocks, monkeypatch):
    """Masks and scores are as large as they may be. (sdpa's own are its kernel's affair.)"""
    monkeypatch.setattr(fused, "MASKED", 1 << 16)
    monkeypatch.setattr(in_torch, "SCORES", 1 << 16)
    with OpCount() as ops:
        follow(tiny_model(dtype=torch.float32), [H2O(99, 99)], [500], [0, padding])
    assert ops.big("bitwise_and") <= 1 << 16 and ops.big("mul") <= 1 << 16
    assert ops.big("masked_fill") <= 1 << 16
