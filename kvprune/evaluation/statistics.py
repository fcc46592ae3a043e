"""How sure a mean is: bootstrap intervals, alone and paired."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean (Efron 1979): low and high."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.asarray(values, dtype=float)[drawn].mean(-1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired(
    values: Sequence[float], baseline: Sequence[float], seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """The mean difference to a baseline on the same samples, and its interval."""
    apart = [v - b for v, b in zip(values, baseline, strict=True)]
    return float(np.mean(apart)), *interval(apart, seed, level)
