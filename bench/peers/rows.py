"""What is compared, by side; a name says the same of both sides where both have it."""

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
"""Rows that no budget is given to: SDTP has a schedule, and evicts nothing."""
