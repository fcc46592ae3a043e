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

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Visible = Callable[[int, int], bool]


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


def attend(
    q: npt.ArrayLike,
    keys: npt.ArrayLike,
    values: npt.ArrayLike,
    columns_q: Sequence[int],
    columns_k: Sequence[int],
    scaling: float,
    visible: Visible | None = None,
) -> tuple[Array, Array]:
    """Causal softmax attention of Q queries over S slots, causality going by column.

    Takes q [G, Q, D], keys [S, D], values [S, Dv], and the columns of the queries (Q) and of the
    slots (S). A query sees a slot if the slot's column is not after its own and, where `visible`
    is given, `visible(query_column, slot_column)` is true; it must see at least one.

    Returns the outputs [G, Q, Dv] and the probabilities [G, Q, S], 0 where a slot is not seen.
    """
    q = np.array(q, dtype=np.float64)
    keys = np.array(keys, dtype=np.float64)
    values = np.array(values, dtype=np.float64)
    heads, queries, _ = q.shape
    slots = len(columns_k)
    if queries != len(columns_q) or len(keys) != slots or len(values) != slots:
        raise ValueError("q, keys, values and their columns disagree in length")

    outputs = np.zeros((heads, queries, values.shape[1]))
    probabilities = np.zeros((heads, queries, slots))
    for g in range(heads):
        for i in range(queries):
            logits: dict[int, float] = {}
            for j in range(slots):
                causal = columns_k[j] <= columns_q[i]
                if causal and (visible is None or visible(columns_q[i], columns_k[j])):
                    logits[j] = scaling * float(np.dot(q[g, i], keys[j]))
            if not logits:
                raise ValueError(f"the query at column {columns_q[i]} sees no slot")
            largest = max(logits.values())
            weights = {j: math.exp(logit - largest) for j, logit in logits.items()}
            total = sum(weights.values())
            for j, weight in weights.items():
                probabilities[g, i, j] = weight / total
                outputs[g, i] += probabilities[g, i, j] * values[j]
    return outputs, probabilities


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


def _check_step(columns: Sequence[int], newest: int | None, q: Array, k: Array, v: Array) -> None:
    """Refuse a step whose arrays disagree with `columns`, or whose columns do not go forward."""
    if q.ndim != 3 or k.ndim != 2 or v.ndim != 2:
        raise ValueError("a step takes q [G, Q, D], k [Q, D] and v [Q, Dv]")
    if not len(columns) == q.shape[1] == k.shape[0] == v.shape[0]:
        raise ValueError("q, k and v must hold one entry for each new column")
    if q.shape[2] != k.shape[1]:
        raise ValueError("q and k disagree in head size")
    for column in columns:
        if newest is not None and column <= newest:
            raise ValueError(f"column {column} does not come after column {newest}")
        newest = column


class H2OOracle:
    """H2O (arXiv 2306.14048) for one row and one KV head.

    A slot's score is the plain sum of the probabilities that every query so far, its own
    included, over all G query heads, gave it. `slots` maps a column to (key [D], value [Dv],
    score). An evicted slot takes its score with it and never returns.
    """

    def __init__(self, heavy: int, recent: int) -> None:
        self.heavy = heavy
        self.recent = recent
        self.slots: dict[int, tuple[Array, Array, float]] = {}
        self._newest: int | None = None

    @property
    def kept(self) -> list[int]:
        """Columns of the slots present, sorted."""
        return sorted(self.slots)

    @property
    def scores(self) -> dict[int, float]:
        """Score of each slot present, by column, in column order."""
        return {column: self.slots[column][2] for column in self.kept}

    def step(
        self,
        columns: Sequence[int],
        q: npt.ArrayLike,
        k: npt.ArrayLike,
        v: npt.ArrayLike,
        scaling: float,
        visible: Visible | None = None,
    ) -> Array:
        """One forward: attend, add to the scores, evict.

        Takes the columns of the Q new tokens (ascending), q [G, Q, D], k [Q, D], v [Q, Dv];
        returns the outputs [G, Q, Dv].
        """
        q = np.array(q, dtype=np.float64)
        k = np.array(k, dtype=np.float64)
        v = np.array(v, dtype=np.float64)
        _check_step(columns, self._newest, q, k, v)
        for i, column in enumerate(columns):
            self.slots[int(column)] = (k[i], v[i], 0.0)
            self._newest = int(column)

        present = self.kept
        keys = np.array([self.slots[column][0] for column in present]).reshape(-1, k.shape[1])
        values = np.array([self.slots[column][1] for column in present]).reshape(-1, v.shape[1])
        outputs, probabilities = attend(q, keys, values, columns, present, scaling, visible)

        for j, column in enumerate(present):
            key, value, score = self.slots[column]
            for g in range(q.shape[0]):
                for i in range(q.shape[1]):
                    score += float(probabilities[g, i, j])
            self.slots[column] = (key, value, score)

        keep = h2o_keep(present, self.scores, self.heavy, self.recent)
        self.slots = {column: self.slots[column] for column in keep}
        return outputs


class StreamingOracle:
    """StreamingLLM (arXiv 2309.17453), original positions, for one row and one KV head.

    `first` is the row's first valid column. `slots` maps a column to (key [D], value [Dv]).
    """

    def __init__(self, sinks: int, window: int, first: int) -> None:
        self.sinks = sinks
        self.window = window
        self.first = first
        self.slots: dict[int, tuple[Array, Array]] = {}
        self._newest: int | None = None

    @property
    def kept(self) -> list[int]:
        """Columns of the slots present, sorted."""
        return sorted(self.slots)

    def step(
        self,
        columns: Sequence[int],
        q: npt.ArrayLike,
        k: npt.ArrayLike,
        v: npt.ArrayLike,
        scaling: float,
        visible: Visible | None = None,
    ) -> Array:
        """One forward: attend, evict.

        Takes the columns of the Q new tokens (ascending), q [G, Q, D], k [Q, D], v [Q, Dv];
        returns the outputs [G, Q, Dv].
        """
        q = np.array(q, dtype=np.float64)
        k = np.array(k, dtype=np.float64)
        v = np.array(v, dtype=np.float64)
        _check_step(columns, self._newest, q, k, v)
        for i, column in enumerate(columns):
            self.slots[int(column)] = (k[i], v[i])
            self._newest = int(column)

        present = self.kept
        keys = np.array([self.slots[column][0] for column in present]).reshape(-1, k.shape[1])
        values = np.array([self.slots[column][1] for column in present]).reshape(-1, v.shape[1])
        outputs, _ = attend(q, keys, values, columns, present, scaling, visible)

        keep = streaming_keep(present, self.sinks, self.window, self.first)
        self.slots = {column: self.slots[column] for column in keep}
        return outputs
