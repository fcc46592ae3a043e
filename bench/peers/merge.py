"""Merges both sides' results: medians, ratios to each side's own dense run, differences."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy

from bench.summary import interval

from .jobs import Job, name
from .rows import DENSE, NO_BUDGET

REFERENCE = "SDTP + H2O"
"""The row that every row is compared with, question by question, at the same share."""

Results = dict[str, dict[str, Any]]


def merged(found: Results, jobs: list[Job], prompts: dict[str, Any], task: str) -> dict[str, Any]:
    """The results of a task, and the settings that they were found with.

    Args:
        found: all results by key.
        jobs: the plan, whose results are taken; missing results are left out.
        prompts: the token ids that were read.
        task: "speed", "field" or "quality".
    """
    kinds = ("speed", "memory") if task == "speed" else (task,)
    keys = [key for job in jobs if job.task in kinds for key in job.keys(prompts)]
    lines = [{**key, **found[name(key)]} for key in keys if name(key) in found]
    sides = dict.fromkeys(line["side"] for line in lines)
    about = {side: found[name({"side": side, "task": "about"})] for side in sides}
    figures = _quality if task == "quality" else _speed
    return {"about": about, "rows": list(figures(lines)), "lines": lines}


def _speed(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    turns = _grouped([e for e in lines if e["task"] != "memory"], "length", "side", "row")
    peaks = _grouped([e for e in lines if e["task"] == "memory"], "length", "side", "row")
    for (length, side, row), mine in turns.items():
        dense = {e["turn"]: e for e in turns[length, side, DENSE]}
        own = [(e, dense[e["turn"]]) for e in mine]
        said = {"length": length, "side": side, "row": row, "turns": len(mine)}
        said["budget"] = mine[0]["budget"]
        for what in ("prefill", "decode"):
            said[what] = statistics.median(e[what] for e in mine)
            ratios = [e[what] / d[what] for e, d in own]
            said[f"{what}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
        for what in ("held", "held_after"):
            said[what] = mine[-1][what]
            said[f"{what}_share"] = own[-1][0][what] / own[-1][1][what]
        peak: dict[str, Any] = peaks.get((length, side, row), [{}])[-1]
        yield said | {what: peak.get(what) for what in ("peak", "beyond")}


def _quality(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    rows = _grouped(lines, "asked", "share", "side", "row")
    shares = sorted({share for _, share, _, _ in rows if share is not None}, reverse=True)
    for asked in dict.fromkeys(key[0] for key in rows):
        for share in shares:
            for (where, given, side, row), mine in rows.items():
                # A row without a budget is the same at every share.
                if where == asked and given == (None if row in NO_BUDGET else share):
                    said = {"asked": asked, "share": share, "side": side, "row": row}
                    yield said | _losses(rows, asked, share, side, mine)


def _losses(
    rows: Any, asked: str, share: float, side: str, mine: list[dict[str, Any]]
) -> dict[str, Any]:
    dense = rows[asked, None, side, DENSE]
    reference = [
        e for key, es in rows.items() if (*key[:2], key[3]) == (asked, share, REFERENCE) for e in es
    ]
    held = {e["number"]: e["held"] for e in dense}
    return {
        "questions": len(mine),
        "nll": statistics.fmean(e["nll"] for e in mine),
        "minus_dense": _difference(mine, dense),
        "minus_reference": _difference(mine, reference),
        "held_share": statistics.fmean(e["held"] / held[e["number"]] for e in mine),
    }


def _difference(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> list[float] | None:
    """The mean difference on questions that both have, and its 95 % interval; None below two."""
    others = {e["number"]: e["nll"] for e in two}
    apart = numpy.array([e["nll"] - others[e["number"]] for e in one if e["number"] in others])
    if len(apart) < 2:
        return None
    return [round(float(apart.mean()), 4), *interval(_mean, apart)]


def _mean(apart: Any, axis: int = -1) -> Any:
    return apart.mean(axis)


def _grouped(lines: list[dict[str, Any]], *names: str) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(tuple(line[n] for n in names), []).append(line)
    return groups
