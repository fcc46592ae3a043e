"""Figures made of many measurements: ratios, spreads, slopes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FEW = 10
"""A spread of fewer values than this goes from the least to the most; else it is the middle half.
"""


@dataclass(frozen=True)
class Spread:
    """A median, and the range in which the other values lie."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) < FEW:
            return cls(statistics.median(values), min(values), max(values))
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)

    def __format__(self, digits: str) -> str:
        return f"{self.median:{digits}} ({self.low:{digits}} to {self.high:{digits}})"


def ratios(mine: Sequence[float], other: Sequence[float]) -> Spread:
    """The spread of ratios turn by turn: a change between turns, as of a clock, is in both."""
    return Spread.of([a / b for a, b in zip(mine, other, strict=True)])


@dataclass(frozen=True)
class Slope:
    """A fitted slope and its standard error."""

    value: float
    error: float


def exponent(tokens: Sequence[float], costs: Sequence[float]) -> Slope:
    """The p of cost = c * tokens ** p, fitted by least squares of the logarithms."""
    return _fitted([math.log(n) for n in tokens], [math.log(c) for c in costs])


def growth(tokens: Sequence[float], turns: Sequence[Sequence[float]]) -> Slope:
    """The share by which a cost changes per 1,000 tokens.

    Each turn has a cost for each of `tokens`, and is fitted by itself and relative to its own mean,
    so that a change between turns is no error; the standard error is that of the turns' mean.
    """
    found = []
    for costs in turns:
        mean = statistics.fmean(costs)
        found.append(_fitted([n / 1000 for n in tokens], [c / mean for c in costs]).value)
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.inf
    return Slope(statistics.fmean(found), error)


def _fitted(x: Sequence[float], y: Sequence[float]) -> Slope:
    from scipy.stats import linregress

    line = linregress(x, y)
    return Slope(float(line.slope), float(line.stderr))
