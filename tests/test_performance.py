"""docs/performance.md is what the results say."""

from __future__ import annotations

from bench.performance import PAGE, against, page


def test_the_page_is_made_of_the_results():
    """Also after results were measured anew."""
    assert PAGE.read_text() == page(), "run python -m bench.performance"


def test_a_ratio_is_of_turns():
    """The median of the ratios, not the ratio of the medians."""
    rows = {"dense": {"prefill": [1.0, 2.0, 10.0]}, "H2O": {"prefill": [2.0, 2.0, 5.0]}}
    assert against(rows, "H2O", "prefill") == "1.00 (0.50 to 2.00)"
    assert against({"dense": {"whole": [1.0]}, "H2O": {"whole": []}}, "H2O", "whole") == ""
