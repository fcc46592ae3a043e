"""Models that are refused, and what cannot work together with a cache that drops tokens."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.attention.masks import LazyMask
from kvprune.policies import StreamingLLM
from kvprune.statistics import Attention

from ..support.models import (
    fresh_model,
    plain_model,
    prompt,
    tiny_config,
    tiny_model,
)
from .checks import LENGTH, assert_refused, assert_same_future, filled, follow, h2o, pruner

# Caches and models that do not belong together.


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_model_that_is_not_attached(cache, backend):
    """By forward and by generate (there `cache=` is refused by transformers itself)."""
    other, ids = fresh_model(backend=backend), prompt(1, 2 * LENGTH)
    assert_refused(
        cache,
        r"expected kvprune\.attach\(model\) first",
        lambda: other(ids, past_key_values=cache),
        lambda: other.generate(ids, past_key_values=cache, max_new_tokens=2),
    )


def test_cache_of_another_model():
    """A cache stays with the model that it was first used with, its twin included."""
    other, ids, cache = kvprune.attach(fresh_model()), prompt(1, 2 * LENGTH), filled(h2o())
    assert_refused(
        cache,
        "belongs to another model.*Make a new ComposedCache",
        lambda: other(ids, past_key_values=cache),
        lambda: other.generate(ids, cache=cache, max_new_tokens=2),
        lambda: other.generate(ids, past_key_values=cache, max_new_tokens=2),
        lambda: other(ids, past_key_values=copy.deepcopy(cache)),
    )


# Models that are refused.


GEMMA3N = {
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "laurel_rank": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 61,
    "head_dim": 8,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 4,
}

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("encoder-decoder", {}),
    "bart": ("encoder-decoder", {"encoder_attention_heads": 4, "decoder_attention_heads": 4}),
    "mpt": ("AttentionInterface", {"d_model": 32, "n_heads": 4, "n_layers": 4}),
    "gemma3n_text": ("several hidden states per token", GEMMA3N),
    "gemma3n_text-shared": ("share keys and values", {**GEMMA3N, "num_kv_shared_layers": 1}),
    "gemma4_text": (
        "no keys and values of their own",
        {
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 61,
        },
    ),
    "diffllama": ("heads are paired", {}),
    "doge": ("a mask of its own", {}),
    "recurrent_gemma": ("cannot leave tokens out", {"lru_width": 32}),
    "mamba": ("linear_attention", {}),
    "jamba": ("linear_attention", {}),
    "lfm2": ("type conv", {"layer_types": ["conv", "full_attention"] * 2}),
    "bert": ("decoder layers", {}),
    "vit": ("self-attention", {}),
}


def changes(model: nn.Module) -> dict[str, Any]:
    """What `attach` would leave on a model."""
    own = {name: sorted(m.__dict__) for name, m in model.named_modules()}
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    config: Any = getattr(model, "config", None)
    return {"own": own, "hooks": hooks, "backend": getattr(config, "_attn_implementation", None)}


def assert_not_attached(model: Any, match: str) -> None:
    """Refused by name, and left as it was."""
    before = changes(model)
    match = rf"^{type(model).__name__} \(model type '{model.config.model_type}'\) is not.*{match}"
    with pytest.raises(KVPruneError, match=match):
        kvprune.attach(model)
    assert changes(model) == before


@pytest.mark.parametrize("family", REFUSED)
def test_family_that_is_refused_by_name(family):
    """With the reason."""
    reason, more = REFUSED[family]
    assert_not_attached(tf.AutoModel.from_config(tiny_config(family, **more)), reason)


def test_decoder_with_more_layers_than_its_encoder_had():
    """transformers makes its caches by the encoder's number, and its own forward fails."""
    options = {"encoder_layers": 2, "decoder_layers": 4, "d_model": 32, "vocab_size": 61}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 4}
    config = tf.BartConfig(**options, **heads, encoder_ffn_dim=48, decoder_ffn_dim=48)
    assert_not_attached(tf.BartForCausalLM(config), "4 decoder layers, and caches for 2")


def test_attention_implementation_that_is_refused():
    """The error says how to load the model instead."""
    model = fresh_model(backend="flex_attention")
    assert_not_attached(model, "'flex_attention'; load it with .*'sdpa' or 'eager'")


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), nn.ModuleList(), None, "gpt2", tf.GPT2Model])
def test_model_that_is_none_of_transformers(wrong):
    """A plain module, or no module at all."""
    got = type(wrong).__name__
    with pytest.raises(KVPruneError, match=f"expected a transformers PreTrainedModel, got {got}"):
        kvprune.attach(wrong)


# What cannot work together with a cache that drops tokens.


def test_gradient_checkpointing_in_training(cache):
    """Hides the cache from the layers, so nothing would be stored; evaluation is fine."""
    model: Any = tiny_model()
    ids = prompt(1, LENGTH)
    names = [
        name
        for name in ("activation", "gradient")
        if hasattr(model, f"{name}_checkpointing_enable")
    ]
    getattr(model, f"{names[0]}_checkpointing_enable")()
    model.train()
    try:
        with torch.enable_grad(), pytest.raises(KVPruneError, match=r"checkpointing_disable.*eval"):
            model(ids, past_key_values=cache)
    finally:
        model.eval()
    twin = copy.deepcopy(cache)
    assert_same_future(cache, twin)
    getattr(model, f"{names[0]}_checkpointing_disable")()


@pytest.mark.parametrize("policies", [[pruner()], [h2o(), pruner()]], ids=repr)
def test_labels_with_pruned_hidden_states(policies):
    """A loss over tokens that left early would be wrong; the error says what to do instead."""
    ids, cache = prompt(1, LENGTH), ComposedCache(policies)
    assert_refused(
        cache,
        "labels with a policy that prunes.*logits_to_keep and compute the loss",
        lambda: tiny_model()(ids, labels=ids, past_key_values=cache),
    )


def test_labels_without_pruned_hidden_states_are_fine():
    """Eviction comes after a prompt's attention, so the loss is the dense one."""
    ids = prompt(1, LENGTH)
    got = tiny_model()(ids, labels=ids, past_key_values=ComposedCache([StreamingLLM(1, 2)])).loss
    assert torch.equal(got, plain_model()(ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("family", "backend", "reason"),
    [
        ("bloom", "eager", "all new tokens at once"),
        ("qwen3_next", "sdpa", "cannot go back"),
        ("deepseek_v3", "sdpa", "expanded after they were stored"),
    ],
)
@pytest.mark.parametrize("how", ["evicts", "observes"])
def test_drafts(family, backend, reason, how):
    """Where they cannot be read one by one, or not be taken back."""
    model: Any = tiny_model(family, backend=backend, dtype=torch.float32)
    ids, cache = prompt(1, 9), ComposedCache([h2o()])
    if how == "observes":
        cache = ComposedCache(observe=(Attention(),))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.activate_past_recording()
    with pytest.raises(KVPruneError, match=f"{reason}.*leave out assistant_model"):
        model(ids, past_key_values=cache)
    assert cache.seen == 9
    cache.leave_generate()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.seen == 18


def test_generate_that_would_drop_its_cache():
    """Phi-3 begins anew beyond the original context; up to there it is right."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    options = {"original_max_position_embeddings": 32, "rope_parameters": rope}
    model: Any = kvprune.attach(fresh_model("phi3", **options))
    cache = ComposedCache([StreamingLLM(1, 4)])
    with pytest.raises(KVPruneError, match=r"beyond 32 columns.* at most 32 tokens"):
        model.generate(prompt(1, 20), cache=cache, max_new_tokens=13)
    assert not cache.is_initialized
    model.generate(prompt(1, 20), cache=cache, max_new_tokens=12)
    assert cache.seen == 31


def test_generate_batch(model):
    """Has a paged cache of its own; the error names the ways out."""
    with pytest.raises(KVPruneError, match=r"use generate, or kvprune\.detach\(model\)"):
        model.generate_batch([[1, 2, 3]])


def test_attention_implementation_set_after_attach(cache):
    """Refused until attached again, from where the cache goes on."""
    model: Any = tiny_model()
    ids = prompt(1, 2 * LENGTH)
    twin = copy.deepcopy(cache)
    expected = follow(model, copy.deepcopy(cache))
    try:
        model.set_attn_implementation("eager")
        for use in (model, partial(model.generate, max_new_tokens=2)):
            with pytest.raises(KVPruneError, match=r"call kvprune\.attach\(model\) again"):
                use(ids, past_key_values=cache)
        kvprune.attach(model)
        assert_same_future(copy.deepcopy(cache), copy.deepcopy(twin), model)
        for got, other in zip(follow(model, cache), expected, strict=True):
            torch.testing.assert_close(got, other, rtol=1e-9, atol=1e-10)
    finally:
        model.set_attn_implementation("sdpa")
        kvprune.attach(model)


def test_attention_implementation_that_is_not_supported(cache):
    """Attaching again is refused then, and a supported one mends it."""
    model: Any = fresh_model()
    kvprune.attach(model)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(KVPruneError, match=r"'flex_attention'.*'sdpa' or 'eager'"):
        kvprune.attach(model)
    model.set_attn_implementation("sdpa")
    kvprune.attach(model)
    fresh = ComposedCache([h2o()])
    assert_same_future(fresh, copy.deepcopy(fresh), model)


def test_probabilities_that_are_never_there_as_a_whole():
    """`output_attentions` with a policy that observes; without one the backend gives them."""
    model = kvprune.attach(fresh_model(backend="eager"))
    cache = ComposedCache([h2o()])
    match = "output_attentions=True with a policy that observes"
    with pytest.raises(KVPruneError, match=match):
        model(prompt(1, LENGTH), past_key_values=cache, output_attentions=True)
    assert cache.seen == 0
    quiet = ComposedCache([StreamingLLM(1, 4)])
    out = model(prompt(1, LENGTH), past_key_values=quiet, output_attentions=True)
    assert len(out.attentions) == 4


def test_mask_that_the_model_s_code_reads_by_itself():
    """Where a family slipped through, the error says so; copies are no such reading."""
    mask = copy.copy(LazyMask(lambda *_: torch.ones(1), plainly_causal=True))
    with pytest.raises(KVPruneError, match=r"reads its attention mask by itself \(\.shape\)"):
        mask.shape  # noqa: B018
