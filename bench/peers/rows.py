"""The rows that are compared, by side; a name that both sides have means the same on both."""

from __future__ import annotations

DENSE = "dense"
OURS, THEIRS = "kvprune", "kvpress"

SPEED: dict[str, tuple[str, ...]] = {
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

BY_NAME = (
    "SnapKV",
    "PyramidKV",
    "TOVA",
    "KeyDiff",
    "Knorm",
    "ObservedAttention",
    "ExpectedAttention",
)
"""Methods that both libraries have."""

FIELD: dict[str, tuple[str, ...]] = {OURS: (DENSE, *BY_NAME), THEIRS: (DENSE, *BY_NAME)}

QUALITY: dict[str, tuple[str, ...]] = {
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
