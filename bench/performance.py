"""docs/performance.md, from what `bench.speed` measured: no number is written by hand.

python -m bench.performance
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"

HEAD = """# Performance

Each candidate against the dense model in the same process, in turns; ratios are medians over the
turns, each to the dense run of its own turn, with the least and the most. Prefill is to come
close to the ratio of FLOPs; a decode step at so many slots is compared with a dense step at a
context of as many tokens. Live MB is the most that tensors beyond the weights held at once while
the prompt was read. SDTP has random heads here, which cost what trained ones do. This page is
made by `python -m bench.performance` from `bench/results/speed-*.json`, which `python -m
bench.speed` writes.
"""
COLUMNS = (
    "policy",
    "prefill s",
    "to dense",
    "FLOPs to dense",
    "decode ms",
    "to dense",
    "MB held",
    "live MB",
    "whole s",
    "to dense",
)


def against(rows: dict[str, Any], name: str, what: str) -> str:
    """The median ratio to dense, with the least and the most; empty where it was not measured."""
    pairs = zip(rows[name][what], rows["dense"][what], strict=bool(rows[name][what]))
    found = sorted(mine / dense for mine, dense in pairs)
    if not found:
        return ""
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def cells(rows: dict[str, Any], name: str) -> list[str]:
    """One line of the table."""
    row, dense = rows[name], rows["dense"]
    whole = f"{statistics.median(row['whole']):.1f}" if row["whole"] else ""
    return [
        name,
        f"{statistics.median(row['prefill']):.2f}",
        against(rows, name, "prefill"),
        f"{row['flops'] / dense['flops']:.3f}",
        f"{statistics.median(row['decode']) * 1e3:.1f}",
        against(rows, name, "decode"),
        f"{row['held'] / 1e6:.1f}",
        f"{row['live'] / 1e6:.1f}",
        whole,
        against(rows, name, "whole"),
    ]


def section(result: dict[str, Any]) -> str:
    """What one file says."""
    about, rows = result["about"], result["rows"]
    asked = about["arguments"]
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *(cells(rows, n) for n in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    new = f"; whole: with {asked['new']} new tokens" if int(asked["new"]) else ""
    return (
        f"\n## {int(asked['context']):,} tokens, {int(asked['budget']):,} slots\n\n"
        f"{asked['repeats']} turns, {about['dtype'].removeprefix('torch.')}, {about['machine']}, "
        f"torch {about['torch']}, transformers {about['transformers']}{new}.\n\n{table}\n"
    )


def page() -> str:
    """The whole page, shortest context first."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("speed-*.json")]
    found.sort(key=lambda result: int(result["about"]["arguments"]["context"]))
    return HEAD + "".join(map(section, found))


if __name__ == "__main__":
    PAGE.write_text(page())
