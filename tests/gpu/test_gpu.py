"""What only a GPU can show. `make test-gpu`, or `python -m pytest -m gpu tests/gpu`.

Skipped without CUDA. Nothing of this has been run by those who wrote it: see the README.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import kvprune
from kvprune.attention import dispatch as attention
from kvprune.attention import received as in_torch
from kvprune.models.backends import FLASH
from kvprune.policies import H2O, StreamingLLM
from kvprune.statistics import Attention

from ..support.models import fresh_model, left_padded, prompt, tiny_model
from ..support.received_cases import CASES, case
from ..support.turns import POLICIES, STEPS, follow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
needs_flash = pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs flash-attn")
HALF = [torch.float16, torch.bfloat16]


@pytest.fixture
def no_blocks(monkeypatch) -> None:
    """The CPU's way fails."""
    monkeypatch.setattr(attention, "block_by_block", None)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("size", [24, 64, 80, 128, 256])
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_equal_the_oracle(name, size, dtype):
    """And are the same in every run."""
    from kvprune.attention import kernels

    this = case(**{**CASES[name], "size": size}).to(dtype).to("cuda")
    expected = in_torch.log_sum_exp_in_torch(*this.arguments())
    lse = kernels.log_sum_exp(*this.arguments())
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)
    expected = in_torch.attention_received_in_torch(*this.with_lse(lse))
    received = kernels.attention_received(*this.with_lse(lse))
    torch.testing.assert_close(received, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(kernels.attention_received(*this.with_lse(lse)), received)
    assert torch.equal(kernels.log_sum_exp(*this.arguments()), lse)


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_every_step_is_that_of_the_cpu(family, name, padding, no_blocks, monkeypatch):
    """In float64, where the kept sets are the same; the mass is then computed in plain torch."""
    model: Any = fresh_model(family)
    model.cuda()
    mine, held = follow(kvprune.attach(model), POLICIES[name](), STEPS, [0, padding])
    monkeypatch.undo()
    theirs, expected = follow(tiny_model(family), POLICIES[name](), STEPS, [0, padding])
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    for here, there in zip(held.layers, expected.layers, strict=True):
        assert torch.equal(here.columns.cpu(), there.columns)


@pytest.mark.parametrize("padding", [0, 70])
def test_a_prefill_s_statistic_is_that_of_the_cpu(padding, no_blocks, monkeypatch):
    """In float32, through the kernels where Triton is installed."""
    model: Any = fresh_model(dtype=torch.float32)
    model.cuda()
    logits, cache = follow(kvprune.attach(model), [H2O(999, 999)], [400, 90], [0, padding])
    monkeypatch.undo()
    cpu = tiny_model(dtype=torch.float32)
    expected, there = follow(cpu, [H2O(999, 999)], [400, 90], [0, padding])
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)
    first = cache.layers[0].statistics[Attention()].cpu()
    torch.testing.assert_close(first, there.layers[0].statistics[Attention()], rtol=1e-3, atol=1e-3)


def half_model(dtype: torch.dtype, backend: str) -> Any:
    """On the GPU, attached; heads of a size that every kernel takes."""
    model: Any = fresh_model(dtype=dtype, hidden_size=256, head_dim=64)
    model.cuda()
    model.set_attn_implementation(backend)
    return kvprune.attach(model)


BACKENDS = ["sdpa", pytest.param(FLASH, marks=needs_flash)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF)
def test_every_valid_query_of_every_query_head_gives_one(dtype, backend, no_blocks):
    """Outputs, log-sum-exp and mass come from three kernels, and agree."""
    _, cache = follow(half_model(dtype, backend), [H2O(999, 999)], [200, 1, 50], [0, 30])
    given = torch.tensor([[502.0] * 2, [442.0] * 2], device="cuda")
    for layer in cache.layers:
        received = layer.statistics[Attention()]
        assert received.dtype == torch.float32
        torch.testing.assert_close(received.sum(-1), given, rtol=2e-3, atol=0)


@needs_flash
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["dense", "H2O"])
def test_flash_attn_says_what_sdpa_says(name, dtype):
    """With budgets that are never reached, since half precision may break ties otherwise."""
    policies = [] if name == "dense" else [H2O(99, 99)]
    results = [follow(half_model(dtype, b), policies, STEPS, [0, 0])[0].float()
               for b in (FLASH, "sdpa")]  # fmt: skip
    error = (results[0] - results[1]).abs().mean() / results[1].std()
    assert error < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dense", "StreamingLLM", "H2O"])
def test_generate(name, backend):
    """A padded batch: new tokens, and budgets that hold."""
    model = half_model(torch.bfloat16, backend)
    policies = POLICIES[name]()
    inputs = {n: t.cuda() for n, t in left_padded(prompt(2, 60), [0, 13]).items()}
    cache = kvprune.ComposedCache(policies)
    tokens = model.generate(**inputs, cache=cache, max_new_tokens=40, do_sample=False)
    assert tokens.shape == (2, 100) and cache.seen == 99
    again = model.generate(
        **inputs, cache=kvprune.ComposedCache(policies), max_new_tokens=40, do_sample=False
    )
    assert torch.equal(tokens, again)
    budget = 99 if name == "dense" else 11
    assert all(layer.used <= budget + 8 for layer in cache.layers)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", [H2O(512, 512), StreamingLLM(4, 1020)], ids=repr)
def test_a_prefill_holds_nothing_n_by_n(policy, backend, no_blocks):
    """16,384 tokens: beside the weights, less than one matrix of that size in bytes."""
    count = 16384
    model = half_model(torch.bfloat16, backend)
    ids = prompt(1, count).cuda()
    for tokens in (ids[:, :256], ids):  # the first to load kernels
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            model(tokens, past_key_values=kvprune.ComposedCache([policy]), logits_to_keep=1)
    assert torch.cuda.max_memory_allocated() - before < count * count


def test_a_copy_of_a_cache_stays_on_its_device():
    """A prefix that is read once and reused."""
    model = half_model(torch.bfloat16, "sdpa")
    cache = kvprune.ComposedCache([H2O(4, 7)])
    with torch.no_grad():
        model(prompt(1, 40).cuda(), past_key_values=cache)
        twin = copy.deepcopy(cache)
        logits = [model(prompt(1, 9).cuda(), past_key_values=c).logits for c in (cache, twin)]
    assert torch.equal(*logits) and twin.layers[0].keys.is_cuda
