"""A naive NumPy cache: every row and head by itself, every token by itself, nothing in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np

from kvprune.testing.oracle import Array, attend

from .oracles import h2o_keep, streaming_keep

Rule = Callable[[list[int], dict[int, float], int], list[int]]
"""Which columns stay, of those present; their scores; the row's first column."""


def heavy_hitters(heavy: int, recent: int) -> Rule:
    """H2O with budgets in tokens."""
    return lambda columns, scores, first: h2o_keep(columns, scores, heavy, recent)


def sinks_and_window(sinks: int, window: int) -> Rule:
    """StreamingLLM with budgets in tokens."""
    return lambda columns, scores, first: streaming_keep(columns, sinks, window, first)


def above(least: float, recent: int) -> Rule:
    """Columns with a score of at least so much, and the newest ones."""
    return lambda columns, scores, first: [
        c for c in columns if scores[c] >= least or c in columns[-recent:]
    ]


def either(one: Rule, other: Rule) -> Rule:
    """A union."""
    return lambda *view: sorted({*one(*view), *other(*view)})


class NaiveHead:
    """One row's one key/value head: a dict from a column to its key, value and score.

    With frequencies, keys are turned from the position that they got with, which `arrived`
    says, to their place among the slots.
    """

    def __init__(self, rules: Sequence[Rule], first: int, frequencies: Array | None) -> None:
        self.rules, self.first, self.frequencies = rules, first, frequencies
        self.slots: dict[int, tuple[Array, Array, float]] = {}
        self.arrived: dict[int, int] = {}

    def read(self, columns: list[int], origin: int, q: Array, k: Array, v: Array) -> Array:
        """One forward: attends, scores, and lets each rule in turn drop some. `[G, Q, D]`.

        origin: the position of the first new token.
        """
        held = sorted(self.slots)
        by = {c: origin - len(held) + i - self.arrived[c] for i, c in enumerate(held)}
        for i, column in enumerate(columns):
            self.slots[column] = (k[i], v[i], 0.0)
            self.arrived[column] = origin + i
        present = sorted(self.slots)
        keys = np.array([self._turned(self.slots[c][0], by.get(c, 0)) for c in present])
        values = np.array([self.slots[c][1] for c in present])
        scaling = q.shape[-1] ** -0.5
        outputs, received = attend(q, keys, values, columns, present, scaling)
        for j, column in enumerate(present):
            key, value, score = self.slots[column]
            self.slots[column] = (key, value, score + float(received[:, :, j].sum()))
        for rule in self.rules:
            scores = {column: self.slots[column][2] for column in self.slots}
            stay = rule(sorted(self.slots), scores, self.first)
            self.slots = {column: self.slots[column] for column in stay}
        return outputs

    def _turned(self, key: Array, by: int) -> Array:
        if self.frequencies is None:
            return key
        a, b = np.split(key, 2)
        cosine, sine = np.cos(by * self.frequencies), np.sin(by * self.frequencies)
        return np.concatenate([a * cosine - b * sine, b * cosine + a * sine])


class NaiveCache:
    """Rows of heads, with the columns seen and what each row's mask is."""

    def __init__(self, rules: Sequence[Rule], frequencies: Array | None = None) -> None:
        self.rules, self.frequencies = rules, frequencies
        self.rows: list[list[NaiveHead]] = []
        self.seen = 0
        # Before each token that can be taken back.
        self.past: list[list[list[NaiveHead]]] = []

    def read(self, q: Array, k: Array, v: Array, padding: list[int], drafts: bool) -> list[Array]:
        """One forward of q `[B, Hq, Q, D]`, k and v `[B, Hkv, Q, D]`; `[Hq, Q - padding, D]`."""
        count, self.past = q.shape[2], []
        if not self.rows:
            firsts = [self.seen + p for p in padding]
            self.rows = [
                [NaiveHead(self.rules, f, self.frequencies) for _ in range(k.shape[1])]
                for f in firsts
            ]
        origins = [max(len(head.slots) for head in heads) for heads in self.rows]
        parts = [[i] for i in range(count)] if drafts else [list(range(count))]
        outputs: list[list[Array]] = [[] for _ in self.rows]
        for part in parts:
            self.past += [copy.deepcopy(self.rows)] if drafts else []
            for row, heads in enumerate(self.rows):
                mine = [i for i in part if i >= padding[row]]
                if mine:
                    origin = origins[row] + mine[0] - padding[row]
                    new = self._read_row(heads, mine, origin, q[row], k[row], v[row])
                    outputs[row].append(new)
        self.seen += count
        return [np.concatenate(each, 1) for each in outputs]

    def _read_row(
        self, heads: list[NaiveHead], new: list[int], origin: int, q: Array, k: Array, v: Array
    ) -> Array:
        groups = len(q) // len(heads)
        columns = [self.seen + i for i in new]
        return np.concatenate(
            [
                head.read(
                    columns, origin, q[h * groups : (h + 1) * groups, new], k[h, new], v[h, new]
                )
                for h, head in enumerate(heads)
            ]
        )

    def take_back(self, count: int) -> None:
        """The newest `count` columns were never read; all but the last forward's stay for good."""
        self.seen -= count
        if count <= len(self.past):
            self.rows, self.past = ([*self.past, self.rows])[-1 - count], []
            return
        self.past = []
        for heads in self.rows:
            for head in heads:
                head.slots = {c: s for c, s in head.slots.items() if c < self.seen}

    def pick(self, rows: list[int]) -> None:
        """Row i becomes what row `rows[i]` was."""
        self.rows, self.past = [copy.deepcopy(self.rows[r]) for r in rows], []

    def forget(self) -> None:
        """As new."""
        self.rows, self.past, self.seen = [], [], 0
