"""A prompt in colour: what more layers hold stands out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from ..ledger.results import Trace
from ..measure.traces import held
from .summary import DENSE, LOWER

SHADES = ("under 25 %", "25–50 %", "50–75 %", "75 % and more", "all")
"""What each shade says of the layers and heads that hold a token."""

MOST_TOKENS = 2400
"""Of a longer prompt its beginning and its end are shown."""

Run = tuple[int, str]


def shade(share: float) -> int:
    """0 for what hardly any layer holds, the last for what all do."""
    return len(SHADES) - 1 if share == 1 else int(share * (len(SHADES) - 1))


def text_runs(trace: Trace) -> list[list[Run]]:
    """Stretches of text with their shades: all of the prompt, or its two ends where it is long."""
    shares = held(trace)
    if len(trace.tokens) <= MOST_TOKENS:
        return [_runs(trace.tokens, shares)]
    half = MOST_TOKENS // 2
    return [
        _runs(trace.tokens[:half], shares[:half]),
        _runs(trace.tokens[-half:], shares[-half:]),
    ]


def _runs(tokens: Sequence[str], shares: NDArray[np.float64]) -> list[Run]:
    shaded = zip(map(shade, shares.tolist()), tokens, strict=True)
    return [(key, "".join(t for _, t in run)) for key, run in groupby(shaded, lambda s: s[0])]


def left_out(trace: Trace) -> int:
    """How many tokens between the two ends are not shown."""
    return max(0, len(trace.tokens) - MOST_TOKENS)


def shown(traces: Sequence[Trace], labels: Sequence[str]) -> Iterator[Trace]:
    """One trace of each policy, as alike as can be: of the first one's sample, the middle budget.

    labels: the policies, in the order in which they are shown.
    """
    real = [t for t in traces if t.cell.policy not in (DENSE, LOWER)]
    budgets = sorted({t.cell.budget for t in real if t.cell.budget is not None})
    middle = budgets[len(budgets) // 2] if budgets else 0.0

    def unlike(trace: Trace) -> tuple[bool, bool, bool, float]:
        mine, first = trace.cell, real[0].cell
        budget = middle if mine.budget is None else mine.budget
        return (
            mine.task != first.task,
            mine.context != first.context,
            trace.sample != real[0].sample,
            abs(budget - middle),
        )

    for label in labels:
        mine = [trace for trace in real if trace.cell.label == label]
        if mine:
            yield min(mine, key=unlike)
