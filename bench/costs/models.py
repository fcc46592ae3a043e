"""The models that are measured, each with and without kvprune, on the same weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kvprune
from kvprune.evaluation.data.assets import demo_model

REAL, LAYER = "SmolLM2-135M", "two layers of a 7B model"

SEVEN_B = {
    "vocab_size": 256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
"""The dimensions of a layer of Mistral-7B, and of Llama-3-8B, which are the same."""


@dataclass
class Pair:
    """Two models that share their weights.

    Attributes:
        plain: the model without kvprune.
        attached: the model with kvprune.
    """

    plain: Any
    attached: Any


class Models:
    """Opens a model when it is asked for, and lets go of the one before.

    Args:
        path: the name or path of a model in the place of the demo model; None for the demo model.
        device: a torch device.
    """

    def __init__(self, path: str | None = None, device: str = "cpu") -> None:
        self.path, self.device = path, device
        self._key: tuple[str, str] | None = None
        self._pair: Pair | None = None

    def get(self, shape: str, dtype: str) -> Pair:
        """The pair of models of a shape (`REAL`, `LAYER`) in a dtype, such as "float32"."""
        if self._pair is None or self._key != (shape, dtype):
            self._pair = None
            made = seven_b(dtype) if shape == LAYER else self._real(dtype)
            self._key, self._pair = (shape, dtype), paired(made.to(self.device))
        return self._pair

    def _real(self, dtype: str) -> Any:
        path = self.path or str(demo_model(report=print))
        return AutoModelForCausalLM.from_pretrained(Path(path), dtype=dtype)


def paired(model: Any) -> Pair:
    """A model and its attached twin, which shares the weights."""
    plain = model.eval().requires_grad_(False)
    shared = {id(t): t for t in (*plain.parameters(), *plain.buffers())}
    return Pair(plain, kvprune.attach(copy.deepcopy(plain, dict(shared))))


def seven_b(dtype: str) -> Any:
    """Two decoder layers with the dimensions of a 7B model's, and a small vocabulary."""
    config = AutoConfig.for_model("llama", **SEVEN_B)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
