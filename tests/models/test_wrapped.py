"""PEFT-wrapped and quantised models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.policies import H2O

from ..support.models import fresh_model, left_padded, prompt
from ..support.strategies import POLICIES
from ..wiring.test_generate import assert_same, generate


def lora(model: Any) -> Any:
    """With adapters that change what the model says."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).double().eval()


@pytest.mark.parametrize("policy", [None, *POLICIES], ids=repr)
@pytest.mark.parametrize("order", ["attach what is wrapped", "wrap what is attached"])
def test_lora_equals_dynamic_cache(policy, order):
    """The wrapper's own generate, with `cache=`; attached before or after it was wrapped."""
    inputs = left_padded(prompt(2, 23), [0, 9])
    plain = lora(fresh_model())
    expected = generate(plain, inputs, DynamicCache(), do_sample=False)
    if order == "attach what is wrapped":
        model = lora(fresh_model())
        assert kvprune.attach(model) is model
    else:
        model = lora(kvprune.attach(fresh_model()))
    cache = ComposedCache([policy.roomy()] if policy else [])
    assert_same(generate(model, inputs, cache, do_sample=False), expected)
    model.generate(**inputs, cache=ComposedCache([H2O(2, 2)]), max_new_tokens=2)


def test_lora_evicts_as_the_merged_model_does():
    """Same tokens and kept sets as with the adapters' weights added to the model's."""
    ids, kept, tokens = prompt(2, 20), [], []
    model = lora(fresh_model())
    for one in (kvprune.attach(model), kvprune.attach(copy.deepcopy(model).merge_and_unload())):
        cache = ComposedCache([H2O(3, 3)])
        tokens.append(one.generate(input_ids=ids, cache=cache, max_new_tokens=8, do_sample=False))
        kept.append(cache.columns(2))
    assert torch.equal(*tokens) and torch.equal(*kept)


def test_detach_of_a_peft_model_leaves_no_trace():
    """Hooks, methods and the name of the attention; the wrapper is handed back."""
    model = lora(fresh_model())
    assert kvprune.detach(kvprune.attach(model)) is model
    inside = model.get_base_model()
    assert "generate" not in inside.__dict__ and inside.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks for m in inside.modules())


def test_a_cache_of_a_peft_model_is_saved_with_its_adapters(tmp_path):
    """Loaded with the wrapped model; the model without them, or with others, is another."""
    model = kvprune.attach(lora(fresh_model()))
    cache = ComposedCache([H2O(3, 3)])
    with torch.no_grad():
        model(input_ids=prompt(1, 12), past_key_values=cache)
    cache.save(tmp_path / "cache")
    assert ComposedCache.load(tmp_path / "cache", [H2O(3, 3)], model).seen == 12
    others = [fresh_model(), lora(fresh_model())]
    with torch.no_grad():
        others[1].get_base_model().model.layers[3].self_attn.q_proj.lora_A["default"].weight.mul_(2)
    for other in others:
        with pytest.raises(KVPruneError, match="one of another"):
            ComposedCache.load(tmp_path / "cache", [H2O(3, 3)], kvprune.attach(other))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_learning_is_refused_by_name(kind):
    """Before anything changes."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(fresh_model(), config)
    with pytest.raises(KVPruneError, match=kind):
        kvprune.attach(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def dynamic(model: Any) -> Any:
    """torch's own int8 linears."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def torchao(model: Any) -> Any:
    """Int8 weights, as tensor subclasses."""
    library = pytest.importorskip("torchao.quantization")
    library.quantize_(model, library.Int8WeightOnlyConfig())
    return model


def quanto(model: Any) -> Any:
    """Int8 weights, in linears of its own."""
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return model


@pytest.mark.parametrize("quantised", [dynamic, torchao, quanto])
@pytest.mark.parametrize("policy", [None, *POLICIES], ids=repr)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_models_equal_dynamic_cache(policy, quantised, tmp_path):
    """The same tokens, logits within float32's rounding; and a saved cache goes on."""
    inputs = left_padded(prompt(2, 23), [0, 9])
    model = quantised(fresh_model(dtype=torch.float32))
    expected = generate(model, inputs, DynamicCache(), do_sample=False)
    policies = [policy.roomy()] if policy else []
    cache = ComposedCache(policies)
    got = generate(kvprune.attach(model), inputs, cache, do_sample=False)
    assert torch.equal(got.sequences, expected.sequences)
    for mine, dense in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-5, atol=5e-5)
    cache.save(tmp_path / "cache")
    assert ComposedCache.load(tmp_path / "cache", policies, model).seen == cache.seen
