"""docs/performance.md is what the results say; what is said of them, on made-up ones."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from bench import performance
from bench.costs import pictures, results
from bench.costs.bars import bars
from bench.costs.candidates import BOTH, DENSE, HEAVY, PRUNED, STREAMING
from bench.costs.numbers import Spread, exponent, growth, ratios

from ..support import made_up_costs

MOST_BYTES = 60_000


@pytest.fixture
def found() -> list[dict[str, Any]]:
    """Results that a test may change."""
    return copy.deepcopy(made_up_costs.results())


def one(found: list[dict[str, Any]], name: str) -> Any:
    """What was found in a part."""
    return next(r["found"] for r in found if r["part"]["name"] == name)


def test_the_page_is_made_of_the_results():
    """And the pictures beside it, also after results were measured anew."""
    there = results.read(performance.RESULTS)
    assert performance.PAGE.read_text() == performance.page(there), (
        "run python -m bench.performance"
    )
    folder = performance.PAGE.parent / "performance"
    drawn = {f"{name}.svg": svg for name, _, svg in pictures.pictures(there)}
    assert {path.name: path.read_text() for path in folder.glob("*.svg")} == drawn


def test_a_ratio_is_of_turns():
    """The median of the ratios, not the ratio of the medians; of many the middle half."""
    assert f"{ratios([2.0, 2.0, 5.0], [1.0, 2.0, 10.0]):.2f}" == "1.00 (0.50 to 2.00)"
    assert Spread.of([*map(float, range(13))]) == Spread(6.0, 3.0, 9.0)
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_an_exponent_is_that_of_the_cost():
    """And its error is 0 where the costs are exact."""
    tokens = [1000, 2000, 4000, 8000]
    p = exponent(tokens, [3 * n**1.5 for n in tokens])
    assert p.value == pytest.approx(1.5) and p.error == pytest.approx(0, abs=1e-6)


def test_growth_is_a_share_of_the_cost_per_thousand_tokens():
    """Each turn over its own mean: a machine that slows down is no growth."""
    tokens = [1000, 2000, 3000]
    slow = growth(tokens, [[1.0, 1.0, 1.0], [5.0, 5.0, 5.0]])
    assert slow.value == pytest.approx(0) and slow.error == pytest.approx(0)
    grows = growth(tokens, [[0.9, 1.0, 1.1], [1.6, 2.0, 2.4]])
    assert grows.value == pytest.approx(0.15)
    assert grows.error == pytest.approx(0.05)


def test_all_bars_are_told_and_met(found):
    """As the made-up results are."""
    told = bars(found)
    # Of two prompts 3 each and H2O's time at 4,096; 3 policies, two of the field; 3 end to end; 4
    # streams; attach.
    assert len(told) == 2 * 3 + 1 + 3 + 2 + 3 + 4 * 3 + 2
    assert [bar for bar in told if not bar.met] == []
    said = {bar.what: bar.measured for bar in told}
    assert (
        said["SDTP, prefill of 4,096: time to dense over FLOPs to dense"]
        == "1.000 (0.975 to 1.000)"
    )
    assert said["SDTP + H2O, 8,192 tokens and 128 new: times faster"] == "1.80 (1.60 to 2.00)"
    assert said["the same: bytes held at the end"] == "15.0%"
    assert said["H2O, prefill of 8,192: live MB beyond dense's"] == "8.0"


def worse(rows: dict[str, Any], what: str, by: float) -> None:
    """In every turn."""
    rows[what] = [by * t for t in rows[what]]


# What breaks which bar: the part, the change, and how the bar begins.
BROKEN: dict[str, tuple[str, Any, str]] = {
    "sdtp": ("prefill-8192", lambda f: worse(f[PRUNED], "prefill", 1.06), "SDTP, prefill of 8,192"),
    "h2o": ("prefill-4096", lambda f: worse(f[HEAVY], "prefill", 1.03), "H2O, prefill of 4,096"),
    "h2o's memory": (
        "prefill-4096",
        lambda f: f[HEAVY].update(live=164_100_000),
        "H2O, prefill of 4,096: live MB",
    ),
    "streaming": (
        "prefill-4096",
        lambda f: worse(f[STREAMING], "prefill", 1.02),
        "StreamingLLM, prefill of 4,096",
    ),
    "a step": ("decode-8192", lambda f: worse(f["64"][HEAVY], "step", 1.02), "H2O, a step at 64"),
    "a step of the field": (
        "field-step-2048",
        lambda f: worse(f["64"]["TOVA"], "step", 1.05),
        "TOVA, after 2,048 tokens, a step at 64",
    ),
    "a round of the field": (
        "field-step-2048",
        lambda f: worse(f["64"]["Knorm, every 64 tokens"], "round", 1.05),
        "Knorm, every 64 tokens, after 2,048 tokens, a step at 64",
    ),
    "whole": ("whole-8192", lambda f: worse(f[BOTH], "whole", 1.15), "SDTP + H2O, 8,192 tokens"),
    "held": ("whole-8192", lambda f: f[BOTH].update(held=15_100_000), "the same: bytes held"),
    "live": (
        "prefill-8192",
        lambda f: f[BOTH].update(live=f[DENSE]["live"]),
        "SDTP + H2O, prefill of 8,192",
    ),
    "exponent": (
        "stream-4096",
        lambda f: f["rows"][HEAVY].update(chunk=[0.1 * (i + 1) for i in range(8)]),
        "H2O, prefill in chunks",
    ),
    "growth": (
        "stream-4096",
        lambda f: f["rows"][HEAVY].update(step=[[0.1, 0.1, 0.11]] * 4),
        "H2O, a step after",
    ),
    "an unsure slope": (
        "stream-4096",
        lambda f: f["rows"][HEAVY].update(step=[[0.1, 0.1, 0.108], [0.11, 0.1, 0.1]] * 2),
        "H2O, a step after",
    ),
    "bytes of a stream": (
        "stream-4096",
        lambda f: f["rows"][HEAVY].update(held=[7, 7, 8]),
        "H2O, bytes held",
    ),
    "attach": (
        "attach-1024",
        lambda f: worse(f["attached"], "step", 1.011),
        "`attach`, dense cache: a step",
    ),
}


@pytest.mark.parametrize(("name", "change", "bar"), BROKEN.values(), ids=BROKEN)
def test_a_bar_that_is_missed_is_said(found, name, change, bar):
    """That one alone."""
    change(one(found, name))
    missed = [b for b in bars(found) if not b.met]
    assert len(missed) == 1 and missed[0].what.startswith(bar)
    assert "**not met**" in performance.page(found)


def test_the_page_has_a_table_for_each_part_and_says_what_is_missing(found):
    """Every line has as many cells as its table's head."""
    text = performance.page(found)
    assert text.count("\n### ") == len(found)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = block.splitlines()
        assert len({line.count("|") for line in lines}) == 1 and len(lines) > 2
    assert "| SDTP | 1.00 | 0.50 (0.49 to 0.50) | 0.500 | 1.000 | 100 | 10.0 | 50.0 |  |" in text
    assert "two layers of a 7B model" in text
    without = [r for r in found if r["part"]["kind"] != "whole"]
    missing = [
        re.findall(r"Not measured yet: (.*)\.", performance.page(r)) for r in (found, without)
    ]
    assert "prefill-1024" in missing[0][0] and "prefill-4096" not in missing[0][0]
    assert "whole-8192" not in missing[0][0] and "whole-8192" in missing[1][0]


def test_pictures_are_small_and_the_same_each_time(found, tmp_path: Path):
    """And those that nothing is left of go."""
    page = tmp_path / "page.md"
    performance.write(found, page)
    first = {path.name: path.read_text() for path in (tmp_path / "performance").iterdir()}
    assert set(first) == {"time.svg", "live.svg", "held.svg", "limit.svg"}
    assert all(len(svg) < MOST_BYTES for svg in first.values())
    performance.write(copy.deepcopy(found), page)
    assert first == {p.name: p.read_text() for p in (tmp_path / "performance").iterdir()}
    assert set(re.findall(r"\(performance/(\w+\.svg)\)", page.read_text())) == set(first)
    performance.write([], page)
    assert not list((tmp_path / "performance").iterdir())


def test_what_is_drawn_is_what_was_measured(found):
    """Another number is another picture."""
    before = {name: svg for name, _, svg in pictures.pictures(found)}
    one(found, "prefill-8192")[HEAVY] |= {"live": 10**9, "held": 10**9, "prefill": [9.0] * 3}
    one(found, "layer-2048")[PRUNED]["flops"] *= 1.2
    after = {name: svg for name, _, svg in pictures.pictures(found)}
    assert all(before[name] != after[name] for name in before)
