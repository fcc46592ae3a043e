"""Every model type that transformers builds as a causal language model: refused, or right.

A few of them here, by what is strange about them; all of them are slow.
"""

from __future__ import annotations

import pytest

from ..support.all_families import (
    AS_STOCK,
    COLUMNS,
    EXACT,
    MODEL_TYPES,
    REFUSED,
    Outcome,
    outcome_of,
)

SAMPLE = {
    "beam": "scales queries by position, and hands that to its layers",
    "gemma4_text": "an input per layer for each token, and two head sizes",
    "granite_swa": "sinks that its attention applies after the softmax",
    "jetmoe": "query heads that read key/value heads in another order",
    "mimo_v2_flash": "other numbers of heads in layers that slide",
    "bart": "positions that count padding",
}
"""Accepted, and fast enough for every run; with what they are here for."""

FEWEST = 80
"""Model types that are accepted at the least; fewer mean that something went wrong in building."""


def check(model_type: str) -> Outcome:
    """Raises where a model type is accepted and comes out wrong."""
    outcome = outcome_of(model_type)
    assert not outcome.wrong, outcome.wrong
    # A refusal says why, and so does what cannot be built.
    assert outcome.accepted or outcome.reason
    if outcome.accepted:
        assert tuple(outcome.cells) == COLUMNS
        assert set(outcome.cells.values()) <= {EXACT, AS_STOCK, REFUSED}
        assert bool(outcome.note) == (REFUSED in outcome.cells.values())
    return outcome


@pytest.mark.parametrize("model_type", [m for m in SAMPLE if m in MODEL_TYPES])
def test_some_families(model_type):
    """Accepted, and right in every cell."""
    assert check(model_type).accepted


@pytest.mark.slow
def test_all_families():
    """None is accepted that comes out wrong in a cell."""
    wrong, accepted = {}, 0
    for model_type in MODEL_TYPES:
        try:
            accepted += check(model_type).accepted
        except AssertionError as error:
            wrong[model_type] = str(error)
    assert not wrong
    assert accepted >= FEWEST
