"""Tiny vision-language models, and prompts with a picture for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import kvprune

from .models import LAYERS

LENGTH = 20
PICTURE = slice(8, 12)
"""The columns of the picture's tokens."""
IMAGE, START = 60, 62

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_TEXT = {
    **TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 24,
    "out_hidden_size": 32,
    "patch_size": 4,
    "temporal_patch_size": 1,
}
QWEN = {"image_token_id": IMAGE, "vision_start_token_id": START}

PICTURES: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **TOWER},
        "image_token_id": IMAGE,
        "vision_feature_layer": -1,
    },
    "qwen2_vl": {
        "text_config": QWEN_TEXT,
        "vision_config": {**QWEN_TOWER, "embed_dim": 16, "mlp_ratio": 2},
        **QWEN,
    },
    "qwen2_5_vl": {
        "text_config": QWEN_TEXT,
        "vision_config": {**QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [1]},
        **QWEN,
    },
    "gemma3": {
        "text_config": {
            **TEXT,
            "head_dim": 8,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "vision_config": {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_id": IMAGE,
    },
    "smolvlm": {
        "text_config": {"model_type": "llama", "pad_token_id": 0, **TEXT},
        "vision_config": {**TOWER, "patch_size": 2},
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
}
"""Options of each family's config."""

MROPE = ("qwen2_vl", "qwen2_5_vl")
"""Families in which tokens of pictures have several positions."""


def picture_model(family: str) -> Any:
    """A new model in float64, not attached."""
    config: Any = AutoConfig.for_model(family, **PICTURES[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().double()


@cache
def attached_picture_model(family: str) -> Any:
    """A shared model that is attached."""
    return kvprune.attach(picture_model(family))


def picture_prompt(family: str, rows: int, padding: int = 0) -> dict[str, Tensor]:
    """A batch of prompts with a picture each, the last row padded on the left."""
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(2, 50, (rows, LENGTH), generator=draw)
    ids[:, PICTURE] = IMAGE
    ids[:, PICTURE.start - 1] = START
    kind = (ids == IMAGE).int()
    mask = torch.ones_like(ids)
    mask[-1, :padding] = ids[-1, :padding] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    pixels = torch.randn(rows, 3, 8, 8, generator=draw, dtype=torch.float64)
    if family in MROPE:
        # 16 patches, of which the tower makes four tokens.
        pixels = torch.randn(rows * 16, 3 * 4 * 4, generator=draw, dtype=torch.float64)
        grid = torch.tensor([[1, 4, 4]] * rows)
        return {**found, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kind}
    if family == "gemma3":
        return {**found, "pixel_values": pixels, "token_type_ids": kind}
    return {**found, "pixel_values": pixels[:, None] if family == "smolvlm" else pixels}


def row_of(prompt: dict[str, Tensor], row: int, padding: int = 0) -> dict[str, Tensor]:
    """One row of a batch, without its padding."""
    rows = len(prompt["input_ids"])
    found = {}
    for name, value in prompt.items():
        each = len(value) // rows
        mine = value[row * each : (row + 1) * each]
        found[name] = mine[:, padding:] if mine.shape[1:] == (LENGTH,) else mine
    return found
