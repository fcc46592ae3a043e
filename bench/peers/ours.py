"""kvprune as a side of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, DynamicCache

import kvprune
from bench.costs.candidates import FIELD, held, random_sdtp
from kvprune.policies import H2O, SDTP, StreamingLLM

from .protocol import Opened
from .rows import DENSE


class Ours:
    """The attached model.

    Args:
        path: the model's folder.
        random_heads: whether SDTP has untrained heads; they cost the same, for any model.
    """

    def __init__(self, path: Path, random_heads: bool) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(path)
        self.model: Any = kvprune.attach(model.eval().requires_grad_(False))
        self.sdtp = random_sdtp(model) if random_heads else SDTP()

    def open(self, row: str, budget: int, length: int) -> Opened:
        """See `Side.open`; the dense model has transformers' own cache."""
        if row == DENSE:
            return Opened(self.model, DynamicCache(config=self.model.config))
        return Opened(self.model, kvprune.ComposedCache(self.policies(row, budget)))

    def policies(self, row: str, budget: int) -> list[kvprune.TokenPolicy]:
        """The policies of a row: they keep `budget` slots in each layer; SDTP has its schedule.

        Methods of the field are as they come: TOVA evicts in each step, the others at the end of
        the prompt.
        """
        h2o = H2O(heavy=budget // 2, recent=budget - budget // 2)
        rows: dict[str, list[kvprune.TokenPolicy]] = {
            "StreamingLLM": [StreamingLLM(sinks=4, window=budget - 4)],
            "H2O": [h2o],
            "SDTP": [self.sdtp],
            "SDTP + H2O": [self.sdtp, h2o],
        }
        by_name = {kind.__name__: kind for kind in FIELD}
        return [by_name[row](budget)] if row in by_name else rows[row]

    def nbytes(self, cache: Any) -> int:
        """See `Side.nbytes`; statistics count too."""
        return held(cache)
