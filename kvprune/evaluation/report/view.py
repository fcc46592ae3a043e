"""The contents of the page, as text and numbers already written out: the template places them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from ..ledger.results import Results, Trace
from .figures import Plot
from .kept_text import left_out, text_runs
from .numbers import NONE, digits, flops_scale, number, percent, ratio, runs, share
from .palette import MARKERS, SERIES
from .plots import MB
from .spark import areas
from .summary import LOWER, Row, Span, Table, labels

_SIGNS = dict(zip(MARKERS, "●■◆▲▼✚✖◀▶", strict=True))
_LINES = ("★", "⋯")  # dense, and no context, which is a dotted line
FIRST = ("model", "date", "command")


def about(run: Mapping[str, object]) -> list[tuple[str, str]]:
    """The settings of the run as names and values: the most wanted ones first, then the rest."""
    names = [name for name in FIRST if name in run] + [name for name in run if name not in FIRST]
    return [(name.replace("_", " "), _plain(run[name])) for name in names]


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return NONE if value is None else str(value)


def sections(tables: Sequence[Table], names: Sequence[str], plots: Sequence[Sequence[Plot]]) -> Any:
    """The contents of one section of the page for each table."""
    return [
        {
            "id": f"part-{i}",
            "task": table.task,
            "context": f"{table.context:,}",
            "unit": table.unit,
            "warnings": table.warnings,
            "plots": figures,
            "flops": flops_scale([row.cost.flops for row in table.rows]).unit,
            "rows": list(_rows(table, names)),
            "failed": [_failed(f.cell, f.error, names) for f in table.failures],
            "parts": _parts(table),
        }
        for i, (table, figures) in enumerate(zip(tables, plots, strict=True), start=1)
    ]


def _rows(table: Table, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    rows, dense = table.rows, table.dense
    flops = flops_scale([row.cost.flops for row in rows])
    score = _decimals(table)
    wide = {
        "seconds": digits([r.cost.seconds for r in rows]),
        "flops": digits([flops.of(r.cost.flops) for r in rows]),
        "decode": digits([r.cost.decode for r in rows if r.cost.decode is not None]),
        "bytes": digits([MB.of(r.cost.peak) for r in rows]),
    }
    for row in rows:
        cost, base = row.cost, None if dense in (None, row) or dense is None else dense.cost
        yield {
            **_who(row, names),
            "samples": row.samples,
            "score": number(row.score.mean, score),
            "interval": _interval(row.score, score),
            "difference": number(row.difference.mean, score, True) if row.difference else NONE,
            "difference_interval": _interval(row.difference, score, True),
            "recovered": percent(None if row.is_line else row.recovered),
            "seconds": number(cost.seconds, wide["seconds"]),
            "seconds_ratio": ratio(cost.seconds, base.seconds) if base else "",
            "flops": number(flops.of(cost.flops), wide["flops"]),
            "flops_ratio": ratio(cost.flops, base.flops) if base else "",
            "decode": number(cost.decode, wide["decode"]),
            "held": number(MB.of(cost.held), wide["bytes"]),
            "held_ratio": ratio(cost.held, base.held) if base else "",
            "peak": number(MB.of(cost.peak), wide["bytes"]),
            "peak_ratio": ratio(cost.peak, base.peak) if base else "",
            "spark": areas(cost),
            "pruned": runs(cost.pruned),
            "evicted": runs(cost.evicted),
            "pruned_share": _mean_share(cost.pruned, cost.tokens),
            "evicted_share": _mean_share(cost.evicted, cost.tokens),
        }


def _decimals(table: Table) -> int:
    return max(2, digits([row.score.mean for row in table.rows]))


def _who(row: Row, names: Sequence[str]) -> dict[str, Any]:
    return {**_named(row.cell, names), "best": row.best, "line": row.is_line}


def _named(cell: Any, names: Sequence[str]) -> dict[str, Any]:
    """A cell's policy, with the sign and the colour that it has in the figures."""
    at = names.index(cell.label) if cell.label in names else None
    return {
        "label": cell.label,
        "policy": cell.policy,
        "budget": "" if cell.budget is None else share(cell.budget),
        "sign": _LINES[cell.policy == LOWER] if at is None else _SIGNS[MARKERS[at % len(MARKERS)]],
        "colour": "ink" if at is None else f"c{at % len(SERIES)}",
    }


def _failed(cell: Any, error: str, names: Sequence[str]) -> dict[str, Any]:
    first = next(iter(error.strip().splitlines()), "")
    return {**_named(cell, names), "error": first or "no message"}


def _interval(span: Span | None, decimals: int, sign: bool = False) -> str:
    if span is None:
        return ""
    if span.low is None or span.high is None:
        return "one sample" if isfinite(span.mean) else NONE
    return f"{number(span.low, decimals, sign)} to {number(span.high, decimals, sign)}"


def _mean_share(by_layer: Sequence[float | None], tokens: float) -> str:
    real = [n for n in by_layer if n is not None]
    return percent(statistics.fmean(real) / tokens if real and tokens else None)


def _parts(table: Table) -> dict[str, Any] | None:
    """The table of the score's parts; None if the task gives none."""
    names = list(dict.fromkeys(name for row in table.rows for name in row.parts))
    if not names:
        return None
    values = [[row.parts.get(name) for name in names] for row in table.rows]
    wide = digits([v for line in values for v in line if v is not None])
    return {
        "names": names,
        "rows": [[number(v, max(2, wide)) for v in line] for line in values],
    }


def overview(tables: Sequence[Table], names: Sequence[str]) -> Any:
    """One line for each policy and budget: its memory, and how much of dense it keeps where."""
    rows = [row for table in tables for row in table.rows if not row.is_line]
    kinds = list(dict.fromkeys((row.cell.label, row.cell.budget) for row in rows))
    kinds.sort(key=lambda kind: (names.index(kind[0]), -(kind[1] or 1)))
    return [_line([_find(table, kind) for table in tables], tables, names) for kind in kinds]


def _find(table: Table, kind: tuple[str, float | None]) -> Row | None:
    for row in table.rows:
        if not row.is_line and (row.cell.label, row.cell.budget) == kind:
            return row
    return None


def _line(
    rows: Sequence[Row | None], tables: Sequence[Table], names: Sequence[str]
) -> dict[str, Any]:
    placed = list(zip(rows, tables, strict=True))
    return {
        **_named(next(row for row in rows if row is not None).cell, names),
        "held": _typical([_held(row, table) for row, table in placed]),
        "flops": _typical([_flops(row, table) for row, table in placed]),
        "cells": [_recovered(row, _decimals(table)) for row, table in placed],
    }


def _held(row: Row | None, table: Table) -> float | None:
    if row is None or table.dense is None or not table.dense.cost.held:
        return None
    return row.cost.held / table.dense.cost.held


def _flops(row: Row | None, table: Table) -> float | None:
    if row is None or table.dense is None or not table.dense.cost.flops:
        return None
    return row.cost.flops / table.dense.cost.flops


def _typical(ratios: Sequence[float | None]) -> str:
    real = [r for r in ratios if r is not None]
    return f"{number(statistics.fmean(real), 2)}×" if real else NONE


def _recovered(row: Row | None, decimals: int) -> dict[str, Any]:
    if row is None:
        return {"text": NONE, "score": "", "fill": 0}
    score = number(row.score.mean, decimals)
    fill = min(1.0, max(0.0, row.recovered or 0.0))
    return {"text": percent(row.recovered), "score": score, "fill": round(100 * fill)}


def kept(traces: Sequence[Trace], plots: Sequence[Plot], names: Sequence[str]) -> Any:
    """A heat map and a coloured text for each trace."""
    return [
        {
            **_named(trace.cell, names),
            "plot": plot,
            "task": trace.cell.task,
            "sample": trace.sample,
            "tokens": f"{len(trace.tokens):,}",
            "pieces": text_runs(trace),
            "left_out": f"{left_out(trace):,}",
        }
        for trace, plot in zip(traces, plots, strict=True)
    ]


def failures(results: Results) -> Any:
    """Every cell that could not be run, with its error."""
    names = labels(results)
    return [
        {
            **_named(f.cell, names),
            "task": f.cell.task,
            "context": f"{f.cell.context:,}",
            "error": f.error,
        }
        for f in results.failures
    ]
