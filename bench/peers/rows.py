"""The rows that are compared, by side; a name that both sides have means the same on both."""

from __future__ import annotations

DENSE = "dense"
OURS, THEIRS = "kvprune", "kvpress"

SPEED = {
    OURS: (DENSE, "StreamingLLM", "H2O", "SDTP", "SDTP + H2O"),
    THEIRS: (
        DENSE,
        "StreamingLLM",
        "SnapKV",
        "ObservedAttention",
        "ExpectedAttention",
        "Knorm",
        "Decoding(Knorm)",
        "SnapKV, then Decoding(Knorm)",
    ),
}

QUALITY = {
    OURS: (DENSE, "StreamingLLM", "H2O", "SDTP", "SDTP + H2O"),
    THEIRS: (
        DENSE,
        "SnapKV",
        "KeyDiff",
        "ObservedAttention",
        "ExpectedAttention",
        "TOVA",
        "StreamingLLM",
        "Knorm",
        "random",
    ),
}

NO_BUDGET = (DENSE, "SDTP")
"""Rows that get no budget: SDTP has a schedule, and evicts nothing."""
