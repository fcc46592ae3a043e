"""What both sides of `bench.parity` are given."""

from __future__ import annotations

LENGTH, BUDGET = 1024, 256
"""The prompt's tokens, and what is kept of them."""
RATIO = 1 - BUDGET / LENGTH
SINKS, RECENT = 4, 60
"""Of StreamingLLM (sinks alone) and of DuoAttention's streaming heads."""
HEAD_SCORES = [[37 * (3 * layer + head) % 90 / 90 for head in range(3)] for layer in range(30)]
"""Made up, one for each head of the demo model: no two are equal."""
