"""kvprune as a side of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, DynamicCache

import kvprune
from kvprune.policies import H2O, SDTP, SDTPHeads, StreamingLLM

from .protocol import Opened
from .rows import DENSE


class Ours:
    """The attached model.

    random_heads: SDTP's are not the trained ones; they cost the same, for any model.
    """

    def __init__(self, path: Path, random_heads: bool) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(path)
        self.model: Any = kvprune.attach(model.eval().requires_grad_(False))
        self.sdtp = _random_sdtp(model.config) if random_heads else SDTP()

    def open(self, row: str, budget: int, length: int) -> Opened:
        """See `Side`; the dense model has transformers' own cache."""
        if row == DENSE:
            return Opened(self.model, DynamicCache(config=self.model.config))
        return Opened(self.model, kvprune.ComposedCache(self.policies(row, budget)))

    def policies(self, row: str, budget: int) -> list[kvprune.TokenPolicy]:
        """Those of a row, which keep `budget` slots in each layer; SDTP keeps its own schedule."""
        h2o = H2O(heavy=budget // 2, recent=budget - budget // 2)
        rows: dict[str, list[kvprune.TokenPolicy]] = {
            "StreamingLLM": [StreamingLLM(sinks=4, window=budget - 4)],
            "H2O": [h2o],
            "SDTP": [self.sdtp],
            "SDTP + H2O": [self.sdtp, h2o],
        }
        return rows[row]

    def nbytes(self, cache: Any) -> int:
        """See `Side`; statistics and all."""
        if isinstance(cache, kvprune.ComposedCache):
            return cache.nbytes
        kept = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return sum(t.untyped_storage().nbytes() for t in kept)


def _random_sdtp(config: Any) -> SDTP:
    """The paper's schedule: every third layer from the fifth, 35 % in the end."""
    stages = len(range(4, config.num_hidden_layers, 3))
    heads = SDTPHeads(config.hidden_size, config.num_hidden_layers, stages)
    return SDTP(heads, keep=0.35 ** (1 / stages))
