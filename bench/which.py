"""Writes the tables of docs/which.md from what `bench.evicting` and `bench.long_answers` measured.

python -m bench.which
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvprune.files import write_text

from . import long_answers

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "which.md"
STREAMS = ROOT / "docs" / "streams.json"

TABLE = re.compile(r"(<!-- table: ([\w. +-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
"""A comment names the results of a table: one file, or several with "+" between them."""


def page(text: str, results: Path = RESULTS) -> str:
    """The page with the tables that the results say; they stand between comments that name them."""

    def made(at: re.Match[str]) -> str:
        return f"{at[1]}{_table_of([results / name for name in at[2].split(' + ')])}{at[3]}"

    return TABLE.sub(made, text)


def _table_of(paths: Sequence[Path]) -> str:
    path = paths[0]
    if path.name == STREAMS.name:
        return _streams(json.loads(STREAMS.read_text())["losses"])
    if path.name == long_answers.RESULTS.name:
        return long_answers.table(json.loads(path.read_text())["rows"])
    return _table(_rows(paths))


def _streams(losses: dict[str, list[float]]) -> str:
    """The perplexity of each method in stretches of the stream; a dash for what was not read."""
    names = ("StreamingLLM", "window", "dense")
    lines = [f"| tokens | {' | '.join(names)} |", "|" + " --- |" * (1 + len(names))]
    for start, stop in ((0, 8000), (8000, 12_000), (12_000, 20_000)):
        stretches = [losses[name][start:stop] for name in names]
        cells = [
            f"{math.exp(_mean(each)):.1f}" if len(each) == stop - start else "-"
            for each in stretches
        ]
        lines.append(f"| {start:,} to {stop:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of results, where a later file has other figures of one those of the later file."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in paths:
        for row in json.loads(path.read_text())["rows"]:
            if row["context"] == 1024 and row["policy"] != "no context":
                found[row["task"], row["policy"], row["budget"]] = row
    return list(found.values())


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each policy at each budget, the least lost first; both data sets side by side."""
    found: dict[tuple[str, float | None], dict[str, dict[str, Any]]] = {}
    for row in rows:
        task = row["task"].partition(",")[0]
        found.setdefault((row["policy"], row["budget"]), {})[task] = row
    lines = ["| kept | policy | bytes | reading | SQuAD | HotpotQA |", "|" + " --- |" * 6]
    for (policy, budget), of in sorted(found.items(), key=lambda item: _order(item[0], item[1])):
        any_row = next(iter(of.values()))
        kept = "its own" if budget is None else f"{budget:g}"
        cells = [kept, f"`{_named(policy)}`", f"{any_row['bytes']:.3f}"]
        cells += [f"{any_row['prefill_flops']:.2f} x"]
        cells += [_said(of.get(task)) for task in ("squad", "hotpotqa")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _order(key: tuple[str, float | None], of: dict[str, dict[str, Any]]) -> tuple[float, float]:
    return -(key[1] or 0), _mean(row["nats_lost"] for row in of.values())


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _named(policy: str) -> str:
    """The policy as the page names it, without places on the machine that measured it."""
    name = policy.replace("sdtp", "SDTP").replace("SDTP+", "SDTP + ")
    name = name.replace("saliency", "Saliency").replace("adakv(base=", "AdaKV(")
    # The share is in a column of its own.
    name = re.sub(r"(snapkv|expectedattention)\(0\.\d+\)", r"\1", name)
    name = re.sub(r"kvzip\(0\.\d+,plus=True\)", "KVzip(plus=True)", name)
    name = name.replace("snapkv)", "SnapKV)").replace("expectedattention", "ExpectedAttention")
    name = name.replace("kvzap", "KVzap")
    name = name.replace("random", "Random").replace(" in quantized", ", in 5 and 4 bits")
    name = name.replace("globalbudget(base=", "GlobalBudget(").replace("snapkv(0.25,", "SnapKV(")
    name = name.replace("when='first',", "").replace("(when='first')", "")
    while "='" in name:
        start = name.rindex("(", 0, name.index("='"))
        name = name[:start] + name[name.index(")", start) + 1 :]
    return name


def _said(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    low, high = row["interval"]
    return f"{row['nats_lost']:.2f} ({low:.2f} to {high:.2f}), {row['samples']}"


def main() -> None:
    """Writes the page."""
    write_text(PAGE, page(PAGE.read_text()))


if __name__ == "__main__":
    main()
