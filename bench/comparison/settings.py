"""The settings of the comparison. Half of it is what two cores can do in an evening."""

from __future__ import annotations

from argparse import Namespace

POLICIES = ("h2o", "streaming", "h2o|streaming", "sdtp", "sdtp+h2o", "sdtp+streaming")
BUDGETS = (0.5, 0.25, 0.125)
CONTEXTS = (1024, 2048)
SAMPLES = 50
SHARED = "squad"
"""The task whose questions kvpress answers too."""

PRESSES = {
    "StreamingLLM": BUDGETS,
    "SnapKV": BUDGETS,
    "KeyDiff": BUDGETS,
    "ExpectedAttention": BUDGETS,
    "ObservedAttention": BUDGETS,
}
"""The presses of kvpress, each at these shares; the last press needs eager attention, at several
times the cost."""


def stages(asked: Namespace) -> list[tuple[str, int]]:
    """The tasks and contexts of kvprune's side, in the order of running."""
    return [(SHARED, n) for n in asked.context] + [("needle", n) for n in asked.needle]
