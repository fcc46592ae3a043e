"""Naive float64 oracles for two KV-cache eviction policies: slow, literal, loops throughout.

They cover one row of a batch and one KV head at a time, and were written from the papers'
rules without sight of the library they check:

* H2O, "Heavy-Hitter Oracle" (arXiv 2306.14048): recent slots plus the best-scored others;
* StreamingLLM, "attention sinks" (arXiv 2309.17453), keeping the original positions.

A *column* is a token's index in its row's sequence, padding included, and never changes. A *slot*
holds one column's key and value. A *step* is one forward, of one token or of many: its tokens
attend to every slot kept before and causally to each other, and then eviction happens once.

Shapes: G query heads of this KV head, Q new tokens, S slots present, D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from kvprune.testing.oracle import Array, DenseOracle


def budget_oracle(part: int | float, n: int) -> int:
    """Tokens that a budget `part` stands for, in a row whose prompt has `n` tokens.

    An int is tokens as it is. A float in (0, 1] is a share of `n`, taken as the decimal that it
    prints as, rounded to the nearest token, halves up, and at least 1. A part of 0 is 0.
    """
    share = Decimal(repr(part))
    if isinstance(part, int):
        return int(share)
    if share == 0:
        return 0
    if not 0 < share <= 1:
        raise ValueError(f"a share must lie in (0, 1], not {part!r}")
    tokens = int((share * Decimal(repr(n))).to_integral_value(rounding=ROUND_HALF_UP))
    return max(tokens, 1)


def h2o_keep(
    columns: Iterable[int], scores: Mapping[int, float], heavy: int, recent: int
) -> list[int]:
    """Columns that H2O keeps (arXiv 2306.14048), sorted.

    `columns` are those present and `scores` holds a score for each. Kept are the last `recent` of
    them, and of the rest the `heavy` with the best scores, ties going to the newer column.
    """
    present = sorted(columns)
    split = max(len(present) - recent, 0)
    rest, last = present[:split], present[split:]
    best_first = sorted(rest, key=lambda column: (scores[column], column), reverse=True)
    return sorted(best_first[:heavy] + last)


def streaming_keep(columns: Iterable[int], sinks: int, window: int, first: int) -> list[int]:
    """Columns that StreamingLLM keeps (arXiv 2309.17453), sorted.

    `columns` are those present and `first` is the row's first valid column. Kept are the present
    ones among first, ..., first + sinks - 1, and the last `window` of the present others.
    """
    present = sorted(columns)
    sink_columns = range(first, first + sinks)
    kept_sinks = [column for column in present if column in sink_columns]
    others = [column for column in present if column not in sink_columns]
    split = max(len(others) - window, 0)
    return sorted(kept_sinks + others[split:])


class H2OOracle(DenseOracle):
    """H2O (arXiv 2306.14048) for one row and one KV head.

    A slot's score is the plain sum of the probabilities that every query so far, its own
    included, over all G query heads, gave it. An evicted slot takes its score with it and never
    returns.
    """

    def __init__(self, heavy: int, recent: int) -> None:
        super().__init__()
        self.heavy = heavy
        self.recent = recent
        self._scores: dict[int, float] = {}

    @property
    def scores(self) -> dict[int, float]:
        """Score of each slot present, by column, in column order."""
        return {column: self._scores[column] for column in self.kept}

    def step(self, *step: Any) -> Array:
        """One forward: attend, add to the scores, evict."""
        outputs = super().step(*step)
        heads, queries, _ = self.probabilities.shape
        for j, column in enumerate(self.kept):
            score = self._scores.get(column, 0.0)
            for g in range(heads):
                for i in range(queries):
                    score += float(self.probabilities[g, i, j])
            self._scores[column] = score
        keep = h2o_keep(self.kept, self.scores, self.heavy, self.recent)
        self.slots = {column: self.slots[column] for column in keep}
        self._scores = {column: self._scores[column] for column in keep}
        return outputs


class StreamingOracle(DenseOracle):
    """StreamingLLM (arXiv 2309.17453), original positions, for one row and one KV head.

    `first` is the row's first valid column.
    """

    def __init__(self, sinks: int, window: int, first: int) -> None:
        super().__init__()
        self.sinks = sinks
        self.window = window
        self.first = first

    def step(self, *step: Any) -> Array:
        """One forward: attend, evict."""
        outputs = super().step(*step)
        keep = streaming_keep(self.kept, self.sinks, self.window, self.first)
        self.slots = {column: self.slots[column] for column in keep}
        return outputs
