"""The tables of docs/performance.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .bars import MB, Bar, chunked, flat, step_of
from .candidates import DENSE
from .models import LAYER
from .numbers import ratios
from .results import Found
from .stream import ORIGINAL

PREFILL = (
    "policy",
    "prefill s",
    "to dense",
    "FLOPs to dense",
    "counted TFLOP",
    "step ms",
    "MB held",
    "live MB",
    "peak MB",
)


def table(head: Sequence[str], lines: Iterable[Sequence[str]], rule: str = "---:") -> str:
    """A Markdown table, with all columns but the first to the right, or as `rule` says."""
    all_lines = [head, ("---", *[rule] * (len(head) - 1)), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in all_lines) + "\n"


def of_bars(bars: Sequence[Bar]) -> str:
    """The table of the bars: the number that is wanted, and the number that was found."""
    return table(("bar", "wanted", "measured", ""), [bar.cells for bar in bars], "---")


def of_prefill(one: Found) -> str:
    """The table of a prefill, with a line for each candidate."""
    rows = one["found"]
    return table(PREFILL, [_prefill(rows, name) for name in rows])


def _prefill(rows: dict[str, Any], name: str) -> list[str]:
    row, dense = rows[name], rows[DENSE]
    return [
        name,
        f"{statistics.median(row['prefill']):.2f}",
        _to_dense(rows, name, "prefill"),
        f"{row['flops'] / dense['flops']:.3f}",
        f"{row['counted_flops'] / 1e12:.3f}",
        f"{statistics.median(row['step']) * 1e3:.0f}",
        f"{row['held'] / MB:.1f}",
        f"{row['live'] / MB:.1f}",
        "" if row["peak"] is None else f"{row['peak'] / MB:.1f}",
    ]


def _to_dense(rows: dict[str, Any], name: str, what: str) -> str:
    return "" if name == DENSE else f"{ratios(rows[name][what], rows[DENSE][what]):.2f}"


def of_decode(one: Found) -> str:
    """The table of steps, with a line for each budget and candidate."""
    lines = [
        [
            f"{int(budget):,}",
            name,
            f"{statistics.median(row[step_of(name)]) * 1e3:.1f}",
            _to_dense(rows, name, step_of(name)),
            f"{row['held'] / MB:.1f}",
        ]
        for budget, rows in one["found"].items()
        for name, row in rows.items()
    ]
    return table(("slots", "policy", "step ms", "to dense", "MB held"), lines)


def of_whole(one: Found) -> str:
    """The table of whole runs, with a line for each candidate."""
    rows = one["found"]
    lines = [
        [
            name,
            f"{statistics.median(row['whole']):.1f}",
            _to_dense(rows, name, "whole"),
            f"{row['held'] / MB:.1f}",
        ]
        for name, row in rows.items()
    ]
    return table(("policy", "seconds", "to dense", "MB held at the end"), lines)


def of_stream(one: Found) -> str:
    """The table of a stream, with a line for each policy and length, and the slopes below."""
    lengths, rows = one["found"]["lengths"], one["found"]["rows"]
    lines = [
        [name, f"{length:,}", *_at(rows, name, lengths, at)]
        for name in rows
        for at, length in enumerate(lengths)
    ]
    slopes = [
        f"* {name}: exponent {chunked(one, name).value:.3f}, steps "
        f"{flat(one, name).value:+.3%} ± {flat(one, name).error:.3%} per 1,000 tokens."
        for name in rows
    ]
    heads = ("policy", "tokens", "s until read", "step ms", "to original positions", "MB held")
    return table(heads, lines) + "\n" + "\n".join(slopes) + "\n"


def _at(rows: dict[str, Any], name: str, lengths: list[int], at: int) -> list[str]:
    row = rows[name]
    chunks = lengths[at] * len(row["chunk"]) // lengths[-1]
    steps = [turn[at] for turn in row["step"]]
    to_original = ""
    if name in ORIGINAL:
        to_original = f"{ratios(steps, [turn[at] for turn in rows[ORIGINAL[name]]['step']]):.3f}"
    return [
        f"{sum(row['chunk'][:chunks]):.1f}",
        f"{statistics.median(steps) * 1e3:.1f}",
        to_original,
        f"{row['held'][at] / MB:.1f}",
    ]


def of_attach(one: Found) -> str:
    """The table of `attach`, with a line for each model."""
    rows = one["found"]
    lines = [
        [name, *(f"{statistics.median(row[w]) * 1e3:.1f}" for w in ("prefill", "step"))]
        for name, row in rows.items()
    ]
    return table(("model", "prefill ms", "step ms"), lines)


def title(one: Found) -> str:
    """The heading of a part, with its sizes and the machine."""
    part, about = one["part"], one["about"]
    kinds = {
        "prefill": f"Prefill of {part['context']:,} tokens",
        "field": f"Prefill of {part['context']:,} tokens by methods of the field",
        "decode": f"Steps after {part['context']:,} tokens",
        "field-step": f"Steps after {part['context']:,} tokens by methods of the field",
        "whole": f"End to end: {part['context']:,} tokens and {part['new']} new ones",
        "stream": f"A stream of {part['context']:,} tokens",
        "attach": f"`attach` alone, {part['context']:,} tokens",
    }
    more = [part["shape"]] if part["shape"] == LAYER else []
    more += [part["dtype"]] if part["dtype"] != "float32" else []
    more += [f"{part['rows']} rows"] if part["rows"] > 1 else []
    machine = f"{about.get('device', about['processor'])}, {about['machine']}"
    return (
        f"### {', '.join([kinds[part['kind']], *more])}\n\n{_slots(part)}{part['repeats']} turns. "
        f"{machine}; torch {about['torch']}, transformers {about['transformers']}.\n"
    )


def _slots(part: dict[str, Any]) -> str:
    slots = ", ".join(f"{budget:,}" for budget in part["budgets"])
    return f"{slots} slots in each layer. " if slots and part["kind"] != "decode" else ""
