"""The attention that observes: the dense model's numbers, and never an n x n matrix."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

import kvprune
from kvprune.attention.blockwise import BLOCK
from kvprune.policies import H2O, StreamingLLM
from kvprune.statistics import Attention

from ..support.driver import Driver
from ..support.models import fresh_model, left_padded, plain_model, prompt, tiny_model
from ..support.opcount import OpCount

LONG = 3 * BLOCK + 7


@pytest.mark.parametrize("padding", [0, 70])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_block_by_block_equals_the_dense_model(padding, heads, backend):
    """Several blocks of queries, then a second turn, over MHA, GQA and MQA."""
    options = {"heads": heads[0], "kv_heads": heads[1]}
    ids = prompt(2, LONG + 80)
    mask = left_padded(ids, [0, padding])["attention_mask"]
    results = []
    for model, cache in (
        (plain_model(**options), DynamicCache()),
        (tiny_model(backend=backend, **options), kvprune.ComposedCache([H2O(999, 999)])),
    ):
        with torch.no_grad():
            for new in (slice(0, LONG), slice(LONG, LONG + 80)):
                now = mask[:, : new.stop]
                out = model(ids[:, new], attention_mask=now, past_key_values=cache)
                results.append(out.logits[mask[:, new].bool()])
    torch.testing.assert_close(results[2:], results[:2], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("policy", [H2O(99, 99), StreamingLLM(4, 99)], ids=repr)
def test_soft_capping_and_attention_sinks_equal_the_dense_model(family, policy):
    """Scores that are capped; sinks that take a share of every softmax; sliding layers.

    In float32: these models' eager functions take the softmax in it whatever the dtype.
    """
    options = {"backend": "eager", "head_dim": 8, "sliding_window": 9, "dtype": torch.float32}
    plain, ours = plain_model(family, **options), tiny_model(family, **options)
    ids = prompt(2, 50)
    mask = left_padded(ids, [0, 11])["attention_mask"]
    dense, cache, start = DynamicCache(config=plain.config), kvprune.ComposedCache([policy]), 0
    for count in (40, 1, 1, 7, 1):
        new, start = slice(start, start + count), start + count
        with torch.no_grad():
            logits = [
                model(ids[:, new], attention_mask=mask[:, :start], past_key_values=c).logits[:, -1]
                for model, c in ((plain, dense), (ours, cache))
            ]
        tolerance = 1024 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(logits[1], logits[0], rtol=tolerance, atol=tolerance)


def test_no_n_by_n_matrix_is_ever_held():
    """Statistics, padding, a second turn: the largest tensor is a block of scores."""
    for padding in (None, [0, 300]):
        driver = Driver([H2O(80, 80)], 2, 4, 2, dtype=torch.float32)
        for count in (1024, 900):
            tokens = driver.tokens(count)
            with torch.no_grad(), OpCount() as ops:
                driver.step(tokens, padding)
            padding = None
            assert ops.big() <= 2 * BLOCK * 1064


@contextmanager
def generating(cache):
    """As inside `generate`, where a chunk of a prompt may end in padding."""
    cache.enter_generate()
    yield
    cache.leave_generate()


def test_what_slots_receive_adds_up():
    """Every valid query of every query head gives one in all."""
    driver = Driver([H2O(999, 999)], 2, 4, 2)
    # The third step is of one token, which is padding in the second row.
    for count, padding in ((100, [0, 30]), (1, None), (1, [0, 1]), (9, None)):
        with generating(driver.cache):
            driver.step(driver.tokens(count), padding)
    received = driver.cache.layers[0].statistics[Attention()].sum(-1)
    expected = torch.tensor([[222.0], [160.0]]).double().expand(2, 2)
    torch.testing.assert_close(received, expected)


def test_without_statistics_the_backend_runs():
    """sdpa where no policy asks: no softmax of ours."""
    cache = kvprune.ComposedCache([StreamingLLM(2, 6)])
    with torch.no_grad(), OpCount() as ops:
        tiny_model()(prompt(1, 20), past_key_values=cache)
    assert not ops.calls["_softmax"]


def test_statistics_are_taken_only_where_somebody_wants_them():
    """`layers` restricts what is computed, too."""
    cache = kvprune.ComposedCache([H2O(2, 3, layers=[2])])
    with torch.no_grad():
        tiny_model()(prompt(1, 20), past_key_values=cache)
    assert [bool(layer.statistics) for layer in cache.layers] == [False, False, True, False]


def test_dropout_in_training_reaches_the_output_but_not_the_statistic():
    """Probabilities vote before dropout."""
    model = kvprune.attach(fresh_model(attention_dropout=0.5)).train()
    caches = [kvprune.ComposedCache([H2O(99, 99)]) for _ in range(2)]
    with torch.no_grad():
        logits = [model(prompt(1, 30), past_key_values=cache).logits for cache in caches]
    assert not torch.equal(*logits)
    received = caches[0].layers[0].statistics[Attention()]
    torch.testing.assert_close(received, caches[1].layers[0].statistics[Attention()])


@pytest.mark.parametrize("budget", [99, 4])
def test_latent_attention_keeps_one_set_per_layer(budget):
    """DeepSeek-V3: all query heads read the slots of one, and all of them vote."""
    options = {"heads": 4, "kv_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
               "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
               "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
               "moe_intermediate_size": 16, "first_k_dense_replace": 4}  # fmt: skip
    plain, ours = (make("deepseek_v3", **options) for make in (plain_model, tiny_model))
    dense, cache = DynamicCache(config=plain.config), kvprune.ComposedCache([H2O(budget, budget)])
    ids, logits = prompt(2, 24), []
    with torch.no_grad():
        for new in (slice(0, 20), slice(20, 21), slice(21, 24)):
            logits += [m(ids[:, new], past_key_values=c).logits for m, c in
                       ((plain, dense), (ours, cache))]  # fmt: skip
    assert cache.columns(0).shape == (2, 1, min(2 * budget, 24))
    if budget == 99:
        torch.testing.assert_close(logits[1::2], logits[::2], rtol=1e-9, atol=1e-10)
        received = cache.layers[0].statistics[Attention()].sum(-1)
        torch.testing.assert_close(received, torch.full_like(received, 24 * 4))
