"""Tiny random models of every family in docs/families.md, and float64 that stays float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import kvprune

from .family_oracle import Local
from .models import LAYERS, VOCAB

WINDOW = 6

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
EVERY_OTHER = ["sliding_attention", "full_attention"] * 2
MLA = {
    **MOE,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
LINEAR = "linear_attention"
HYBRID = {
    **MOE,
    "head_dim": 8,
    "num_experts": 4,
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
SLIDING = {"sliding_window": WINDOW, "head_dim": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, **MOE},
    "phi": {},
    "phi3": {},
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "llama4_text": {
        "attention_chunk_size": WINDOW,
        "num_local_experts": 4,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
        "no_rope_layer_interval": 2,
        "floor_scale": 4,
    },
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "layer_types": EVERY_OTHER},
    "cohere2": {"sliding_window": WINDOW, "layer_types": EVERY_OTHER},
    "starcoder2": {},
    "stablelm": {},
    "nemotron": {},
    "glm4": {"head_dim": 8},
    "granite": {},
    "smollm3": {},
    "gpt_oss": {**SLIDING, "num_local_experts": 4},
    "gpt_neox": {},
    "gpt2": {"n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
    "falcon": {},
    "falcon-alibi": {"alibi": True},
    "falcon-new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "deepseek_v3": MLA,
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma4_text": {
        **SLIDING,
        "global_head_dim": 12,
        "layer_types": EVERY_OTHER,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
    },
    "qwen3_next": {**HYBRID, "layer_types": [LINEAR, "full_attention"] * 2},
    "qwen3_5_text": {**HYBRID, "layer_types": [LINEAR, "full_attention"] * 2},
    "qwen3_5_moe_text": {**HYBRID, "layer_types": [LINEAR, "full_attention"] * 2},
    "olmo_hybrid": {**HYBRID, "layer_types": [LINEAR, "full_attention"] * 2},
    "qwen3_next-ends": {**HYBRID, "layer_types": [LINEAR, LINEAR, "full_attention", LINEAR]},
}


SLOW = {
    "mistral",
    "olmo3",
    "cohere2",
    "starcoder2",
    "glm4",
    "qwen3_5_moe_text",
    "olmo_hybrid",
    "qwen3_next-ends",
}
"""Families whose like is among the others; `make test-all` runs them too."""

CANNOT_PRUNE = {"llama4_text": "positions that it counts from the cache"}
"""Families that are refused with policies that prune hidden states, and what the error says."""


class StaysDouble(TorchFunctionMode):
    """While open, what a model's code would compute in float32 it computes in float64.

    Norms, softmax and RoPE of most families go through float32 whatever the model's dtype,
    which makes 1e-7 of the 1e-16 by which two ways of computing the same differ.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func` with float64 where float32 was asked for."""
        kwargs = {name: _doubled(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*(_doubled(value) for value in args), **kwargs)


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def family_config(family: str, **more: Any) -> Any:
    """A config of 4 layers, hidden size 32."""
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        **FAMILIES[family],
        **more,
    }
    return AutoConfig.for_model(family.split("-")[0], **options)


def unfilled(weight: torch.Tensor) -> bool:
    """Whether a family leaves a weight as it was in memory, or zero."""
    return not bool(weight.isfinite().all()) or not 0 < float(weight.abs().max()) <= 10


def family_model(family: str, backend: str | None = None, **more: Any) -> PreTrainedModel:
    """A float64 model of its own, in eval mode, not attached; always the same weights."""
    # The default implementation of experts has no float64 kernel.
    options = {"experts_implementation": "eager"}
    # Until transformers 5.20 the default for soft-capped scores is sdpa, which leaves that out.
    backend = "eager" if family == "gemma2" else backend
    if backend is not None:
        options["attn_implementation"] = backend
    # Whoever asks first: what RoPE is made of is not float32 for those that ask later.
    with torch.random.fork_rng(), StaysDouble():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family_config(family, **more), **options)
        for parameter in model.parameters():
            # Attention sinks, biases and router corrections begin at a constant.
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            elif unfilled(parameter):
                parameter.data = 0.3 * torch.randn(parameter.shape, dtype=parameter.dtype)
    return model.eval().double()


@cache
def plain_family(family: str) -> PreTrainedModel:
    """A shared model that is not attached: the dense reference."""
    return family_model(family)


@cache
def attached_family(family: str) -> PreTrainedModel:
    """A shared model that is attached; its weights equal `plain_family`'s."""
    return kvprune.attach(family_model(family))


@cache
def eager_family(family: str) -> PreTrainedModel:
    """`plain_family` with the eager backend, whose attention modules return probabilities."""
    return family_model(family, "eager")


def slots_of(family: str) -> int:
    """How many key/value heads the family's caches hold.

    Latent attention (MLA) stores one latent for all heads; Falcon's new architecture stores
    its keys and values repeated for every query head.
    """
    return {"gpt2": 4, "opt": 4, "gpt_neox": 4, "bloom": 4, "falcon": 1, "falcon-alibi": 1,
            "falcon-new": 4, "deepseek_v3": 1}.get(family, 2)  # fmt: skip


SEES: dict[str, list[int | None]] = {
    "mistral-window": [WINDOW] * 4,
    "gemma2": [WINDOW, None, WINDOW, None],
    "gemma3_text": [WINDOW, None, WINDOW, None],
    "gpt_oss": [WINDOW, None, WINDOW, None],
    "olmo3": [WINDOW, None, WINDOW, None],
    "cohere2": [WINDOW, None, WINDOW, None],
    "llama4_text": [WINDOW, None, WINDOW, None],
    "gemma4_text": [WINDOW, None, WINDOW, None],
}


def local_of(family: str) -> list[Local | None]:
    """By layer, what its queries can see; None for everything."""
    sizes = SEES.get(family, [None] * LAYERS)
    chunked = family == "llama4_text"
    return [None if size is None else Local(size, chunked) for size in sizes]


def tiles_heads(family: str) -> bool:
    """Whether query head i reads key/value head i modulo their number, not its neighbours' one."""
    return family == "jetmoe"


STATES = (
    "hybrid: every other layer is linear attention, keeps its stock state and has no slots; "
    "pruned tokens never reach it"
)
NOTES = {
    "olmo3": "every other layer slides",
    "cohere2": "every other layer slides",
    "qwen3_next": STATES,
    "qwen3_5_text": STATES,
    "qwen3_5_moe_text": STATES,
    "olmo_hybrid": STATES,
    "qwen3_next-ends": "as before, with linear layers first and last",
    "mistral-window": "every layer slides",
    "gemma2": "eager (soft-capped scores); every other layer slides",
    "gemma3_text": "every other layer slides",
    "llama4_text": "chunked layers; its hidden states cannot be pruned",
    "gpt_oss": "eager (attention sinks); every other layer slides",
    "bloom": "ALiBi; computes attention by itself",
    "falcon": "computes attention by itself; one head for all (multi-query)",
    "falcon-alibi": "with ALiBi; its eager code adds ALiBi twice in this release, sdpa does not",
    "falcon-new": "new decoder architecture; stores keys and values for every query head",
    "deepseek_v3": "latent attention (MLA): one kept set per layer",
    "jetmoe": "query head i reads key/value head i modulo their number",
    "gemma4_text": "every other layer slides; two head sizes; an input per layer for each token",
}
"""What docs/families.md says of a family besides its cells."""


def linear_of(family: str) -> list[int]:
    """The layers that keep a state instead of slots."""
    kinds = FAMILIES[family].get("layer_types", ())
    return [layer for layer, kind in enumerate(kinds) if kind == LINEAR]
