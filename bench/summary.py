"""The figures of `bench.sdtp`: shares of what random scores lose, paired, with intervals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from scipy.stats import bootstrap

from .items import QUESTIONS


def results(path: Path) -> list[dict[str, Any]]:
    """The results so far; a last line that a kill cut off is removed from the file."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]))
    return [json.loads(line) for line in lines if line.endswith("\n")]


def values(found: list[dict[str, Any]], task: str, name: str = "value") -> dict[str, Any]:
    """One number for each item that was measured, by row and by the item's number."""
    rows: dict[str, dict[int, float]] = {}
    for r in found:
        if r["task"] == task and name in r:
            rows.setdefault(r["row"], {})[r["number"]] = r[name]
    return rows


def paired(*rows: dict[int, float]) -> tuple[Any, ...]:
    """The numbers of the items that all rows have, one array for each row."""
    numbers = sorted(set.intersection(*(set(r) for r in rows)))
    return tuple(numpy.array([r[n] for n in numbers]) for r in rows)


def interval(statistic: Callable[..., Any], *samples: Any) -> list[float]:
    """The 95 % bootstrap interval of a statistic; items are resampled, paired over the samples."""
    low, high = bootstrap(
        samples, statistic, paired=True, n_resamples=5000, method="percentile", rng=0
    ).confidence_interval
    return [round(float(low), 4), round(float(high), 4)]


def recovered(random: Any, row: Any, dense: Any, axis: int = -1) -> Any:
    """The share that a row recovers of what random scores lose against dense."""
    return (random - row).mean(axis) / (random - dense).mean(axis)


def summary(found: list[dict[str, Any]], tasks: list[str]) -> dict[str, Any]:
    """The figures of all tasks that were measured."""
    return {task: _summary(found, task) for task in tasks if values(found, task)}


def _summary(found: list[dict[str, Any]], task: str) -> dict[str, Any]:
    rows = values(found, task)
    said: dict[str, Any] = {"rows": {name: _row(rows, name, task) for name in rows}}
    if task == "hotpotqa":
        for name in ("supporting_kept", "others_kept"):
            for row, kept in values(found, task, name).items():
                said["rows"][row][name] = round(float(numpy.nanmean(list(kept.values()))), 4)
    four = ("SDTP + H2O 40 %", "SDTP", "H2O 40 %", "dense")
    if set(four) <= set(rows) and task in QUESTIONS:
        samples = paired(*(rows[name] for name in four))
        said["compound_error"] = round(float(_compound(*samples)), 4)
        said["compound_error_95"] = interval(_compound, *samples)
    return said


def _row(rows: dict[str, dict[int, float]], name: str, task: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "items": len(rows[name]),
        "mean": round(float(numpy.mean(list(rows[name].values()))), 4),
    }
    if task not in QUESTIONS or name in ("dense", "random") or not {"dense", "random"} <= set(rows):
        return row
    share = paired(rows["random"], rows[name], rows["dense"])
    row["recovered"] = round(float(recovered(*share)), 4)
    row["recovered_95"] = interval(recovered, *share)
    # Oracles are measured on the first items alone.
    row["few"] = len(rows[name]) < len(rows["dense"])
    for other in ("SDTP", "paper's head"):
        if other in rows and other != name:
            both = paired(rows[name], rows[other])
            row[f"minus {other}"] = round(float(_difference(*both)), 4)
            row[f"minus {other}_95"] = interval(_difference, *both)
    return row


def _difference(one: Any, two: Any, axis: int = -1) -> Any:
    return (one - two).mean(axis)


def _compound(both: Any, sdtp: Any, h2o: Any, dense: Any, axis: int = -1) -> Any:
    """The amount by which H2O costs more after SDTP than it costs alone."""
    return (both - sdtp - h2o + dense).mean(axis)
