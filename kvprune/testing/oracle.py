"""What a policy is compared with, step by step: naive attention of one row and one head.

`DenseOracle` keeps everything; the oracle of a policy derives from it and drops slots after each
step, from the paper's maths alone. Slow, literal, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import KVPruneError

Array = npt.NDArray[np.float64]
Visible = Callable[[int, int], bool]
"""Whether a query at one column may see a slot of another one."""


class Oracle(Protocol):
    """What `Oracles` and `check_each_step` ask of an oracle."""

    @property
    def kept(self) -> list[int]:
        """The columns of the slots present, sorted."""

    @property
    def scores(self) -> Mapping[int, float] | None:
        """The attention that these slots received, by column; None compares nothing.

        Compared with the policy's `Attention()`.
        """

    def step(
        self, columns: Sequence[int], q: Array, k: Array, v: Array, scaling: float,
        visible: Visible | None,
    ) -> Array:  # fmt: skip
        """One forward of one row and key/value head: attends, and then drops what goes.

        Args:
            columns: those of the Q new tokens, ascending; padding is left out.
            q: `[G, Q, D]`, of the query heads that read this head.
            k: `[Q, D]`.
            v: `[Q, Dv]`.
            scaling: what products are multiplied by.
            visible: whether a query at one column (the first) may see a slot of another one (the
                second), causality left out; None where causality is all.

        Returns:
            the outputs, `[G, Q, Dv]`.
        """


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

    Args:
        q: `[G, Q, D]`.
        keys: `[S, D]`.
        values: `[S, Dv]`.
        columns_q: those of the queries.
        columns_k: those of the slots.
        scaling, visible: see `Oracle.step`.

    Returns:
        the outputs `[G, Q, Dv]` and the probabilities `[G, Q, S]`, 0 where a slot is not seen.

    Raises:
        KVPruneError: lengths that disagree, or a query that sees no slot.
    """
    q = np.array(q, dtype=np.float64)
    keys = np.array(keys, dtype=np.float64)
    values = np.array(values, dtype=np.float64)
    heads, queries, _ = q.shape
    slots = len(columns_k)
    if queries != len(columns_q) or len(keys) != slots or len(values) != slots:
        raise KVPruneError(
            f"attend: expected a column for each of {queries} queries, and a key and value for "
            f"each of {slots} columns, got {len(columns_q)} columns, {len(keys)} keys and "
            f"{len(values)} values"
        )

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
                raise KVPruneError(
                    f"attend: the query at column {columns_q[i]} sees none of the slots "
                    f"{list(columns_k)}: expected at least its own. The oracle dropped too much"
                )
            largest = max(logits.values())
            weights = {j: math.exp(logit - largest) for j, logit in logits.items()}
            total = sum(weights.values())
            for j, weight in weights.items():
                probabilities[g, i, j] = weight / total
                outputs[g, i] += probabilities[g, i, j] * values[j]
    return outputs, probabilities


class DenseOracle:
    """Attends to all, and keeps all; what derives from it drops slots after each step.

    Attributes:
        slots: (key `[D]`, value `[Dv]`) by column.
        probabilities: `[G, Q, S]` of the last step, over the slots in the order of their columns;
            `kept` says which these are until slots are dropped.
    """

    def __init__(self) -> None:
        self.slots: dict[int, tuple[Array, Array]] = {}
        self.probabilities = np.zeros((0, 0, 0))
        self._newest: int | None = None

    @property
    def kept(self) -> list[int]:
        """The columns of the slots present, sorted."""
        return sorted(self.slots)

    @property
    def scores(self) -> Mapping[int, float] | None:
        """None: nothing is compared; see `Oracle`."""
        return None

    def step(
        self, columns: Sequence[int], q: npt.ArrayLike, k: npt.ArrayLike, v: npt.ArrayLike,
        scaling: float, visible: Visible | None = None,
    ) -> Array:  # fmt: skip
        """See `Oracle.step`.

        Raises:
            KVPruneError: arrays that disagree, or columns that do not go forward.
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
        outputs, self.probabilities = attend(q, keys, values, columns, present, scaling, visible)
        return outputs


def _check_step(columns: Sequence[int], newest: int | None, q: Array, k: Array, v: Array) -> None:
    """Refuse a step whose arrays disagree with `columns`, or whose columns do not go forward."""
    if q.ndim != 3 or k.ndim != 2 or v.ndim != 2:
        raise _no_step(columns, q, k, v)
    if not len(columns) == q.shape[1] == k.shape[0] == v.shape[0] or q.shape[2] != k.shape[1]:
        raise _no_step(columns, q, k, v)
    for column in columns:
        if newest is not None and column <= newest:
            raise KVPruneError(
                f"step: expected columns that go forward, got column {column} behind {newest}"
            )
        newest = column


def _no_step(columns: Sequence[int], q: Array, k: Array, v: Array) -> KVPruneError:
    got = ", ".join(str(list(each.shape)) for each in (q, k, v))
    return KVPruneError(
        f"step: expected q [G, Q, D], k [Q, D] and v [Q, Dv] for Q = {len(columns)} columns, got "
        f"{got}"
    )
