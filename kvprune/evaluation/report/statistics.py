"""The uncertainty of a mean: bootstrap intervals, of samples and of paired differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import KVPruneError

RESAMPLES = 10_000
# The most values that are drawn at once: thousands of samples would otherwise need gigabytes.
_AT_ONCE = 2_000_000


def interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """The bootstrap percentile interval of the mean (Efron and Tibshirani 1993, chapter 13).

    For one value it is (nan, nan), as one value does not say how far others would be. If all values
    are equal, the interval has no width, though the next value may differ.

    Raises:
        KVPruneError: no values, a value that is not finite, or a level that is not between 0 and 1.
    """
    found = _checked(values, level)
    if len(found) == 1:
        return float("nan"), float("nan")
    means = _resampled_means(found, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired(
    values: Sequence[float], baseline: Sequence[float], seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """The mean of values minus baseline, sample by sample, and its interval: (mean, low, high).

    Raises:
        KVPruneError: an error of `interval`, or another number of values than of baselines.
    """
    if len(values) != len(baseline):
        raise KVPruneError(
            "paired: expected a value and a baseline of each sample, got"
            f" {len(values)} and {len(baseline)}"
        )
    differences = _checked(values, level) - _checked(baseline, level)
    return float(differences.mean()), *interval(differences.tolist(), seed, level)


def _checked(values: Sequence[float], level: float) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.size == 0 or not np.isfinite(found).all():
        raise KVPruneError(f"interval: expected at least one value, all finite, got {values!r}")
    if not 0 < level < 1:
        raise KVPruneError(f"interval: expected a level between 0 and 1, got {level}")
    return found


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    draw, size = np.random.default_rng(seed), max(1, _AT_ONCE // len(values))
    means = [
        values[draw.integers(len(values), size=(min(size, RESAMPLES - done), len(values)))].mean(1)
        for done in range(0, RESAMPLES, size)
    ]
    return np.concatenate(means)
