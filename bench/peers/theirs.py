"""kvpress as a side of the comparison; runs in its own environment, without kvprune."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import kvpress
from transformers import AutoModelForCausalLM, DynamicCache

from .protocol import Opened

PRESSES = {
    "StreamingLLM": kvpress.StreamingLLMPress,
    "SnapKV": kvpress.SnapKVPress,
    "ObservedAttention": kvpress.ObservedAttentionPress,
    "ExpectedAttention": kvpress.ExpectedAttentionPress,
    "KeyDiff": kvpress.KeyDiffPress,
    "TOVA": kvpress.TOVAPress,
    "PyramidKV": kvpress.PyramidKVPress,
    "Knorm": kvpress.KnormPress,
    "random": kvpress.RandomPress,
}
"""The presses by row, with their defaults but for the share."""


class Theirs:
    """The stock model; presses hook into it while their contexts are entered."""

    def __init__(self, path: Path) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(path)
        self.model: Any = model.eval().requires_grad_(False)

    def open(self, row: str, budget: int, length: int) -> Opened:
        """See `Side.open`; contexts as in kvpress's pipeline."""
        reading, after = self._presses(row, budget, length)
        eager = row == "ObservedAttention"
        return Opened(
            self.model,
            DynamicCache(config=self.model.config),
            self._pressed(reading, eager),
            self._pressed(after, eager),
        )

    def _presses(self, row: str, budget: int, length: int) -> tuple[Any, Any]:
        """The press while the prompt is read, and the press afterwards; None for no press."""
        # Half a token more than the budget, as kvpress rounds down how many tokens are left.
        ratio = max(0.0, 1 - (budget + 0.5) / length)
        if row in PRESSES:
            return PRESSES[row](compression_ratio=ratio), None
        # As kvpress's README shows it: compression every 10 steps.
        decoding = kvpress.DecodingPress(kvpress.KnormPress(), 10, target_size=budget)
        both = kvpress.PrefillDecodingPress(kvpress.SnapKVPress(ratio), decoding)
        return {
            "dense": (None, None),
            "Decoding(Knorm)": (None, decoding),
            "SnapKV, then Decoding(Knorm)": (both, both),
        }[row]

    @contextmanager
    def _pressed(self, press: Any, eager: bool) -> Iterator[None]:
        if eager:
            self.model.set_attn_implementation("eager")
        try:
            with press(self.model) if press is not None else nullcontext():
                yield
        finally:
            self.model.set_attn_implementation("sdpa")

    def nbytes(self, cache: Any) -> int:
        """See `Side.nbytes`."""
        kept = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return sum(t.untyped_storage().nbytes() for t in kept)
