"""A prompt in colour: the more layers hold a token, the more the token stands out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from ..ledger.results import Trace
from ..measure.traces import held
from .summary import DENSE, LOWER

SHADES = ("under 25 %", "25–50 %", "50–75 %", "75 % and more", "all")
"""The meaning of each shade: the share of layers and heads that hold a token."""

MOST_TOKENS = 2400
"""The most tokens that are shown; of a longer prompt, its beginning and its end."""

# A shade, and the text that has it.
Run = tuple[int, str]


def shade(share: float) -> int:
    """The shade of a token: 0 if hardly any layer holds it, the last one if all layers do."""
    return len(SHADES) - 1 if share == 1 else int(share * (len(SHADES) - 1))


def text_runs(trace: Trace) -> list[list[Run]]:
    """The prompt's text in runs of one shade.

    Returns:
        one list for the whole prompt; two lists, for its two ends, if it is long.
    """
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
    """The number of tokens between the two ends, which are not shown."""
    return max(0, len(trace.tokens) - MOST_TOKENS)


def shown(traces: Sequence[Trace], labels: Sequence[str]) -> Iterator[Trace]:
    """One trace of each policy, all as alike as possible.

    The trace of a policy is the one most like the first trace: of its task, context and sample, at
    the middle budget.

    Args:
        traces: all traces.
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
