"""Bootstrap intervals: cases that can be worked out, and scipy's."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kvprune import KVPruneError
from kvprune.evaluation.report import statistics
from kvprune.evaluation.report.statistics import interval, paired


def test_the_interval_of_few_values_is_that_of_all_their_resamples():
    """Two values have means 0, 1/2, 1 with chances 1/4, 1/2, 1/4; three have 27 resamples."""
    assert interval([0.0, 1.0]) == (0.0, 1.0)
    assert interval([0.0, 1.0], level=0.4) == (0.5, 0.5)
    values = [0.0, 1.0, 5.0]
    means = [float(np.mean(some)) for some in product(values, repeat=3)]
    # Away from the steps of the distribution, whose chances are 1/27 and more.
    low, high = interval(values, level=0.9)
    assert low == pytest.approx(np.quantile(means, 0.05, method="inverted_cdf"))
    assert high == pytest.approx(np.quantile(means, 0.95, method="inverted_cdf"))


@given(st.integers(0, 99), st.integers(5, 60), st.sampled_from([0.5, 0.8, 0.95]))
def test_the_interval_is_scipy_s(seed, count, level):
    """Within what 10,000 draws differ by: a few hundredths of the mean's standard error."""
    values = np.random.default_rng(seed).normal(size=count)
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=level, method="percentile", rng=seed
    ).confidence_interval
    ours = interval(values.tolist(), seed=seed, level=level)
    error = values.std() / math.sqrt(count)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.15 * error)


def test_the_seed_is_all_the_chance_there_is():
    """The same one gives the same interval."""
    values = np.random.default_rng(0).normal(size=30).tolist()
    assert interval(values) == interval(values, seed=0) != interval(values, seed=1)


def test_many_values_are_drawn_in_parts(monkeypatch):
    """And all resamples are there."""
    values = np.arange(50.0)
    monkeypatch.setattr(statistics, "_AT_ONCE", 50 * 3000)
    means = statistics._resampled_means(values, 0)
    assert means.shape == (statistics.RESAMPLES,)
    assert means.std() == pytest.approx(values.std() / math.sqrt(50), rel=0.03)


def test_a_pair_s_difference_is_judged_not_its_parts():
    """Values that differ by one from a baseline that is all over the place are sure to."""
    baseline = [0.0, 10.0, -50.0, 100.0]
    assert paired([b + 1 for b in baseline], baseline) == (1.0, 1.0, 1.0)
    mean, low, high = paired([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert mean == 1.0 and (low, high) == interval([0.0, 1.0, 2.0])


def test_one_value_has_no_interval():
    """And alike ones none that is wide."""
    assert all(math.isnan(end) for end in interval([3.0]))
    mean, low, high = paired([3.0], [1.0])
    assert mean == 2.0 and math.isnan(low) and math.isnan(high)
    assert interval([2.0] * 9) == (2.0, 2.0)


def test_what_is_no_sample_is_refused():
    """None, not a number, no level, one without its baseline."""
    for call in (
        lambda: interval([]),
        lambda: interval([1.0, math.nan]),
        lambda: interval([1.0, -math.inf]),
        lambda: interval([1.0], level=1.0),
        lambda: paired([1.0, 2.0], [1.0]),
        lambda: paired([], []),
    ):
        with pytest.raises(KVPruneError, match="expected"):
            call()
