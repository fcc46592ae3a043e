"""What the proof makes of its measurements: pairing, shares, compound error, the table."""

from __future__ import annotations

from typing import Any

import pytest

from bench.summary import summary
from bench.tables import sdtp_table

DENSE, RANDOM, SDTP, H2O, BOTH = "dense", "random", "SDTP", "H2O 40 %", "SDTP + H2O 40 %"


def results(task: str, **rows: dict[int, float]) -> list[dict[str, Any]]:
    """As they come line by line; `_` stands for what a keyword cannot spell."""
    names = {"sdtp": SDTP, "h2o": H2O, "both": BOTH, "oracle": "saliency oracle"}
    return [
        {"task": task, "number": number, "row": names.get(row, row), "value": value}
        for row, values in rows.items()
        for number, value in values.items()
    ]


FOUND = results(
    "squad",
    dense={0: 1.0, 1: 2.0, 2: 3.0, 3: 2.0},
    random={0: 3.0, 1: 4.0, 2: 5.0, 3: 4.0},
    sdtp={0: 1.5, 1: 2.0, 2: 4.0, 3: 2.5},
    oracle={1: 2.5, 3: 2.5},
    h2o={0: 2.0, 1: 2.0, 2: 3.0, 3: 3.0},
    both={0: 2.5, 1: 2.5, 2: 4.0, 3: 3.0},
)


def test_the_recovered_share_is_of_what_random_scores_lose():
    """(random - x) / (random - dense), here of 2.0 on every question."""
    row = summary(FOUND, ["squad"])["squad"]["rows"][SDTP]
    assert row["items"] == 4 and row["mean"] == 2.5
    assert row["recovered"] == pytest.approx(1 - (0.5 + 0.0 + 1.0 + 0.5) / 4 / 2.0)
    low, high = row["recovered_95"]
    assert 0.5 <= low < row["recovered"] < high <= 1.0


def test_a_row_is_compared_on_the_questions_that_it_has():
    """An oracle that was asked two of four, against SDTP on the same two."""
    row = summary(FOUND, ["squad"])["squad"]["rows"]["saliency oracle"]
    assert row["items"] == 2 and row["few"]
    assert row["recovered"] == pytest.approx(0.75)
    low, high = row["minus SDTP_95"]
    assert low == 0.0 and high == 0.5 and row["minus SDTP"] == pytest.approx(0.25)


def test_the_compound_error_is_what_h2o_loses_more_after_sdtp():
    """(both - SDTP) - (H2O - dense), question by question."""
    said = summary(FOUND, ["squad"])["squad"]
    each = [2.5 - 1.5 - 1.0, 2.5 - 2.0 - 0.0, 4.0 - 4.0 - 0.0, 3.0 - 2.5 - 1.0]
    assert said["compound_error"] == pytest.approx(sum(each) / 4)
    low, high = said["compound_error_95"]
    assert min(each) <= low < said["compound_error"] < high <= max(each)


def test_the_table_has_a_line_for_each_row():
    """In the order of the measurements; what was not measured is a dash."""
    needles = results("needle-1024", dense={0: 1.0, 1: 0.0})
    table = sdtp_table({"tasks": summary(FOUND + needles, ["squad", "needle-1024"])})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert {len(line) for line in lines} == {8}
    assert [line[0] for line in lines[2:]] == [DENSE, RANDOM, SDTP, "saliency oracle", H2O, BOTH]
    assert lines[2][1:3] == ["2.00", "-"] and lines[2][6] == "0.50 / -"
    assert lines[4][2].startswith("0.75 (") and ", 2 questions)" in lines[5][2]
