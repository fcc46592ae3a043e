"""flash-attn's call contract, against a stand-in in plain torch, and what runs in its place.

Nothing here was run on a GPU; `tests/gpu` is for that.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import kvprune
from kvprune import KVPruneError
from kvprune.attention.flash import attention as flash_attention
from kvprune.attention.masks import LazyMask
from kvprune.policies import H2O, StreamingLLM
from kvprune.statistics import Attention

from ..support.flash_stand_in import FlashStandIn
from ..support.models import fresh_model, left_padded, plain_model, prompt, tiny_config, tiny_model
from ..support.turns import POLICIES, STEPS, assert_same, follow, on_the_cpu

EXACT = (torch.float64,)


@pytest.fixture
def flash(monkeypatch) -> FlashStandIn:
    """The stand-in in the place of the package, for float64."""
    stand_in = FlashStandIn(EXACT)
    stand_in.install(monkeypatch)
    return stand_in


def flash_model(family: str = "llama", **options: Any) -> Any:
    """Attached, as it were loaded with attn_implementation="flash_attention_2"."""
    model = fresh_model(family, **options)
    model.config._attn_implementation = "flash_attention_2"
    return kvprune.attach(model)


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt_neox"])
def test_every_step_is_that_of_the_cpu(family, name, padding, flash):
    """Several turns, with what was evicted gone and the rest in no order, and GQA."""
    expected = on_the_cpu(family, POLICIES[name](), STEPS, [0, padding])
    assert not flash.calls
    assert_same(follow(flash_model(family), POLICIES[name](), STEPS, [0, padding]), expected)


def queries(flash: FlashStandIn) -> list[int]:
    """How many each call asked with."""
    return [call["queries"] for call in flash.calls]


TURNS = [40, 12, 1, 1, 12]
"""The last turn finds the slot that the token before it freed, which lies empty."""


def test_without_a_statistic_flash_attention_runs_wherever_causality_is_all(flash):
    """In every layer, with eviction too; not where a row holds padding or an empty slot."""
    follow(flash_model(), [StreamingLLM(2, 9)], TURNS, [0, 0])
    assert queries(flash) == [n for n in TURNS[:-1] for _ in range(4)]
    assert not any(call["lse"] for call in flash.calls)
    flash.calls.clear()
    follow(flash_model(), [], TURNS, [0, 0])
    assert queries(flash) == [n for n in TURNS for _ in range(4)]
    flash.calls.clear()
    follow(flash_model(), [StreamingLLM(2, 9)], TURNS, [0, 9])
    assert queries(flash) == [n for n in TURNS[1:-1] for _ in range(4)]


def test_with_a_statistic_it_hands_the_log_sum_exp_back(flash):
    """For several tokens; a single one's probabilities are few."""
    follow(flash_model(), [H2O(4, 7)], TURNS, [0, 0])
    assert queries(flash) == [40] * 4 + [12] * 4
    assert all(call["lse"] for call in flash.calls)


def test_a_sliding_window_by_place_only_where_nothing_was_left_out(flash):
    """The first turn of a layer that slides; what is pruned leaves gaps that a window counts."""
    follow(flash_model("mistral-window"), [], [40, 12], [0, 0])
    assert [(c["queries"], c["window_size"]) for c in flash.calls] == [(40, (11, 0))] * 4
    flash.calls.clear()
    follow(flash_model("mistral-window"), [], [11], [0, 0])
    assert [c["window_size"] for c in flash.calls] == [(-1, -1)] * 4
    flash.calls.clear()
    follow(flash_model("mistral-window"), POLICIES["SDTP"](), [40], [0, 0])
    assert len(flash.calls) < 4


OTHERS = {
    "gemma2": {"head_dim": 8, "sliding_window": 9},
    "gpt_oss": {"head_dim": 8, "sliding_window": 9},
    "deepseek_v3": {
        "kv_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 12, "moe_intermediate_size": 16,
        "first_k_dense_replace": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("policies", ["dense", "H2O", "StreamingLLM"])
@pytest.mark.parametrize("family", OTHERS)
def test_soft_caps_are_handed_on_and_sinks_and_uneven_heads_go_elsewhere(
    family, policies, monkeypatch
):
    """In float32, which these models' eager functions take the softmax in."""
    flash = FlashStandIn((torch.float32,))
    flash.install(monkeypatch)
    backend = "sdpa" if family == "deepseek_v3" else "eager"
    options = {"backend": backend, "dtype": torch.float32, **OTHERS[family]}
    expected = on_the_cpu(family, POLICIES[policies](), STEPS, [0, 5], **options)
    model = flash_model(family, **options)
    assert_same(follow(model, POLICIES[policies](), STEPS, [0, 5]), expected, rtol=1e-4)
    follow(model, POLICIES[policies](), [30], [0, 0])
    capped = [call["softcap"] == 50.0 for call in flash.calls]
    assert (bool(capped) and all(capped)) == (family == "gemma2")


def test_dropout_reaches_the_output_but_not_the_statistic(flash):
    """With a statistic not by flash-attn, which would hand all probabilities back."""
    model = fresh_model(attention_dropout=0.5)
    model.config._attn_implementation = "flash_attention_2"
    model = kvprune.attach(model).train()
    caches = [kvprune.ComposedCache([H2O(99, 99)]) for _ in range(2)]
    logits = [model(prompt(1, 30), past_key_values=cache).logits for cache in caches]
    assert not torch.equal(*logits) and not flash.calls
    received = [cache.layers[0].statistics[Attention()] for cache in caches]
    torch.testing.assert_close(*received)
    model(prompt(1, 30), past_key_values=kvprune.ComposedCache([])).logits.sum().backward()
    assert [call["dropout_p"] for call in flash.calls] == [0.5] * 4
    assert model.get_input_embeddings().weight.grad.isfinite().all()


def test_what_the_package_has_no_argument_for_is_left(flash):
    """Whatever else holds: asked without inputs, these are not looked at."""
    for more in (
        {"s_aux": torch.zeros(2)},
        {"position_bias": torch.zeros(1, 2, 3, 3)},
        {"dropout": 0.5, "softcap": 3.0},
        {"dropout": 0.5, "with_lse": True},
    ):
        nothing: Any = None
        assert flash_attention(nothing, **more) is None
    assert not flash.calls


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_a_mask_of_the_user_s_is_respected(family, flash):
    """A 4-D one, which hides more than causality does."""
    mask = torch.ones(20, 20, dtype=torch.bool).tril().tril(3).expand(1, 1, -1, -1).clone()
    mask[..., 1:, 0] = False
    for policies in ([], [H2O(99, 99)]):
        logits = []
        for model in (plain_model(family), flash_model(family)):
            ours = model is not plain_model(family)
            cache: Any = kvprune.ComposedCache(policies) if ours else DynamicCache()
            with torch.no_grad():
                out = model(prompt(1, 20), attention_mask=mask, past_key_values=cache)
            logits.append(out.logits)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-9, atol=1e-10)
    assert not flash.calls


def test_drafts_and_generate(flash):
    """Prompt-lookup decoding, where each draft is attended to by itself, beside greedy."""
    model, ids = flash_model(), prompt(1, 12).repeat(1, 3)
    for policies in ([StreamingLLM(2, 9)], [H2O(4, 7)]):
        tokens = [
            model.generate(
                ids, cache=kvprune.ComposedCache(policies), max_new_tokens=12, do_sample=False,
                prompt_lookup_num_tokens=lookup,
            )
            for lookup in (None, 4)
        ]  # fmt: skip
        tokens.append(
            tiny_model().generate(
                ids, cache=kvprune.ComposedCache(policies), max_new_tokens=12, do_sample=False
            )  # type: ignore[operator]
        )
        assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_only(dtype, monkeypatch):
    """The package takes no other; what is float32 goes to sdpa."""
    flash = FlashStandIn()
    flash.install(monkeypatch)
    for kind, calls in ((torch.float32, 0), (dtype, 8)):
        got = follow(flash_model(dtype=kind), [H2O(99, 99)], [30, 10], [0, 0])
        expected = on_the_cpu("llama", [H2O(99, 99)], [30, 10], [0, 0], dtype=torch.float32)
        assert len(flash.calls) == calls
        error = (got[0].float() - expected[0]).abs().mean() / expected[0].std()
        assert error < (1e-5 if kind == torch.float32 else 0.05)
        statistic = got[1].layers[0].statistics[Attention()]
        assert statistic.dtype == torch.float32
        torch.testing.assert_close(statistic.sum(-1), torch.full((2, 2), 80.0), rtol=1e-3, atol=0)


def test_loaded_by_name_and_without_our_caches_it_is_transformers_own(flash):
    """Through transformers' own checks; masks are the stock ones then."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config("llama", 4, 2)
        model: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation="flash_attention_2"
        )
    model = model.eval().double()
    outputs = []
    for attached in (False, True, False):
        (kvprune.attach if attached else kvprune.detach)(model)
        name = "kvprune_flash_attention_2" if attached else "flash_attention_2"
        assert model.config._attn_implementation == name
        with torch.no_grad():
            cache = DynamicCache()
            outputs.append(model(prompt(1, 20), past_key_values=cache).logits)
            outputs.append(model(prompt(1, 7), past_key_values=cache).logits)
    assert len(flash.calls) == 24
    for first, later in ((0, 2), (1, 3), (0, 4), (1, 5)):
        assert torch.equal(outputs[first], outputs[later])


def test_the_rule_is_handed_on_as_with_other_backends(flash, monkeypatch):
    """Not the 2-D mask or None of the stock function."""
    masks = []

    def noted(inputs: Any, **more: Any) -> None:
        masks.append(inputs.mask)

    monkeypatch.setattr("kvprune.attention.flash.attention", noted)
    inputs = left_padded(prompt(2, 12), [0, 4])
    with torch.no_grad():
        flash_model()(**inputs, past_key_values=kvprune.ComposedCache([]))
    assert len(masks) == 4 and all(type(mask) is LazyMask for mask in masks)


def test_without_the_package_attach_refuses(monkeypatch):
    """With the ways out, and the model as it was."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    model = fresh_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(KVPruneError, match=r"pip install 'kvprune\[flash\]'.*'sdpa'"):
        kvprune.attach(model)
    assert model.config._attn_implementation == "flash_attention_2"


def test_models_with_attention_of_their_own_are_refused(monkeypatch):
    """Falcon's modules call flash-attn by themselves, on masks that no slot follows."""
    model = AutoModelForCausalLM.from_config(tiny_config("falcon"), attn_implementation="sdpa")
    FlashStandIn().install(monkeypatch)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(KVPruneError, match=r"'flash_attention_2'.*'sdpa' or 'eager'\."):
        kvprune.attach(model)
