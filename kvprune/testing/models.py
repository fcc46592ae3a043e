"""Tiny random models of several families, made once per process."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..wiring.attach import attach

VOCAB = 61
LAYERS = 4

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 12},
    "gpt_neox": {},
}


def tiny_config(family: str, heads: int = 4, kv_heads: int = 2, **more: Any) -> Any:
    """A config of 4 layers and hidden size 32."""
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        **FAMILIES.get(family, {}),
        **more,
    }
    return AutoConfig.for_model(family.split("-")[0], **options)


class ExactRMSNorm(nn.Module):
    """RMSNorm in the model's own precision.

    Stock modules compute in float32 whatever the model's dtype, so that a float64 model would agree
    with an oracle to 1e-6 only.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = stock.weight
        self.epsilon: float = stock.variance_epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalises hidden states `[..., C]`."""
        return self.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + self.epsilon).rsqrt()


class ExactRotary(torch.nn.Module):
    """Rotary angles in float64; stock modules compute them in float32 whatever the dtype."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", stock.inv_freq.double(), persistent=False)
        self.scaling = stock.attention_scaling

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """The cosine and sine, `[B, Q, R]` each, of positions `[B, Q]`."""
        half = position_ids[..., None].double() * self.inv_freq
        angles = torch.cat([half, half], -1)
        return tuple((t * self.scaling).to(hidden.dtype) for t in (angles.cos(), angles.sin()))


def _exact(model: PreTrainedModel) -> PreTrainedModel:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                setattr(parent, name, ExactRMSNorm(child))
            if hasattr(child, "inv_freq") and hasattr(child, "rope_type"):
                setattr(parent, name, ExactRotary(child))
    return model


def fresh_model(
    family: str = "llama",
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    backend: str = "sdpa",
    **more: Any,
) -> PreTrainedModel:
    """A new model in eval mode, not attached; the same arguments give the same weights."""
    config = tiny_config(family, heads, kv_heads, **more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=backend)
    # Exact in float64 alone: otherwise a buffer of frequencies would be cast with the weights.
    return (_exact(model) if dtype == torch.float64 else model).eval().to(dtype)


@cache
def plain_model(family: str = "llama", **options: Any) -> PreTrainedModel:
    """A shared model that is not attached: the dense reference."""
    return fresh_model(family, **options)


@cache
def tiny_model(family: str = "llama", **options: Any) -> PreTrainedModel:
    """A shared model that is attached; its weights equal `plain_model`'s."""
    return attach(fresh_model(family, **options))


def prompt(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids `[rows, length]`, never the pad token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (rows, length), generator=generator)


def left_padded(ids: torch.Tensor, padding: list[int]) -> dict[str, torch.Tensor]:
    """Inputs for a model: `ids` with each row's first `padding[row]` columns turned to padding."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids as `generate` makes them from a padding mask."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
