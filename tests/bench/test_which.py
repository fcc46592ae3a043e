"""docs/which.md has the tables that the results say."""

from __future__ import annotations

import json
from pathlib import Path

from bench import which


def test_the_page_says_what_the_results_say():
    """Each number of its tables is from a results file."""
    text = which.PAGE.read_text()
    assert len(which.TABLE.findall(text)) == 7
    assert which.page(text) == text, "run python -m bench.which"


def test_a_table(tmp_path: Path):
    """A line for each policy at each budget, the least lost first; a dash for what was not run."""
    row = {"context": 1024, "budget": 0.25, "bytes": 0.26, "prefill_flops": 1.0, "samples": 30}
    rows = [
        {**row, "task": "squad", "policy": "h2o", "nats_lost": 0.5, "interval": [0.25, 0.75]},
        {**row, "task": "hotpotqa", "policy": "h2o", "nats_lost": 0.1, "interval": [0, 0.2]},
        {
            **row,
            "task": "squad, question unknown",
            "policy": "saliency(heads='heads')",
            "nats_lost": 0.125,
            "interval": [0.0, 0.25],
        },
        {**row, "task": "squad", "policy": "no context", "nats_lost": 1, "interval": [0, 1]},
        {**row, "task": "squad", "policy": "h2o", "context": 2048},
    ]
    old = [{**rows[0], "nats_lost": 9}]
    (tmp_path / "old.json").write_text(json.dumps({"rows": old}))
    (tmp_path / "some.json").write_text(json.dumps({"rows": rows}))
    # Of two files the later one counts.
    text = "<!-- table: old.json + some.json -->\n<!-- /table -->"
    assert "0.50 (0.25 to 0.75)" in which.page(text, tmp_path)
    text = "a\n<!-- table: some.json -->\nold\n<!-- /table -->\nb"
    assert which.page(text, tmp_path).splitlines() == [
        "a",
        "<!-- table: some.json -->",
        "| kept | policy | bytes | reading | SQuAD | HotpotQA |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 0.25 | `Saliency` | 0.260 | 1.00 x | 0.12 (0.00 to 0.25), 30 | - |",
        "| 0.25 | `h2o` | 0.260 | 1.00 x | 0.50 (0.25 to 0.75), 30 | 0.10 (0.00 to 0.20), 30 |",
        "<!-- /table -->",
        "b",
    ]
