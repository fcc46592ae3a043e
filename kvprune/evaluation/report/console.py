"""The rows as tables in a terminal: quality beside cost, one table for each task and context."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 160
COLUMNS = (
    "policy",
    "budget",
    "score",
    "95 %",
    "to dense",
    "n",
    "prefill s",
    "prefill GFLOP",
    "decode tokens/s",
    "MB held",
    "MB peak",
    "kept",
)


def show(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Prints rows.

    Args:
        rows: the rows as `rows_of` (in `rows.py`) returns them.
        console: the console to print on; None for stdout.
    """
    if console is None:
        console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    where = sorted(rows, key=lambda row: (str(row["task"]), int(row["context"])))
    for (task, context), mine in groupby(where, key=lambda row: (row["task"], row["context"])):
        console.print(_table(f"{task}, {context} tokens", list(mine)))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    # Without markup, because a path or a spec may hold brackets.
    named = Text(f"{title} ({rows[0]['unit'] or 'no unit'})")
    table = Table(title=named, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in rows:
        table.add_row(Text(row["label"]), *_numbers(row))
    return table


def _numbers(row: dict[str, Any]) -> list[str]:
    if not row["samples"]:
        return [_said(row["budget"], "g"), "failed"]
    span = (_said(row[f"score_{end}"], ".3f") for end in ("low", "high"))
    return [
        _said(row["budget"], "g"),
        _said(row["score"], ".3f") + (" (failed)" if row["error"] else ""),
        " to ".join(span) if row["score_low"] is not None else "",
        _said(row["difference"], "+.3f"),
        str(row["samples"]),
        _said(row["prefill_seconds"], ".2f"),
        _said(row["prefill_flops"], ".1f", 1e9),
        _said(row["decode_tokens_per_second"], ".1f"),
        _said(row["bytes_held"], ".1f", 1e6),
        _said(row["bytes_peak"], ".1f", 1e6),
        _said(row["share_kept"], ".0%"),
    ]


def _said(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else format(value / unit, form)
