"""Collects the results of both sides in one compact JSON, and writes the report and the page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.peers import jobs
from bench.peers.rows import DENSE, OURS, THEIRS
from kvprune.evaluation.ledger import ledger
from kvprune.evaluation.ledger.results import Results
from kvprune.evaluation.report import write_report
from kvprune.evaluation.report.rows import rows_of
from kvprune.evaluation.report.statistics import interval, paired
from kvprune.files import write_text

from . import theirs
from .page import FIGURES, NAME, drawn, page
from .settings import SHARED

DIGITS = 6
_LEFT_OUT = ("policy", "unit", "pruned", "error", "prompt_tokens")
Scores = dict[tuple[str, float | None], dict[int, dict[str, float]]]


def collected(work: Path) -> dict[str, Any]:
    """All results: the settings of the runs, a row for each cell, and every sample's score.

    Raises:
        KVPruneError: nothing was measured yet, or the results are damaged.
    """
    results = ledger.read(work)
    rows, scores = list(_ours(results)), _scores(results)
    about = {OURS: {k: v for k, v in results.run.items() if k != "digest"}}
    said = {"about": about, "units": dict(results.units), "rows": rows, "scores": scores}
    _add_theirs(said, work)
    return said


def _add_theirs(said: dict[str, Any], work: Path) -> None:
    """Puts kvpress's rows and scores in the place of those of the same cells."""
    found = jobs.read(theirs.results(work))
    name = jobs.name({"side": THEIRS, "task": "about"})
    if name in found:
        said["about"][THEIRS] = found[name]
    for path in sorted(work.glob("prompts-*.json")):
        context = int(path.stem.removeprefix("prompts-"))
        losses = _losses(found, theirs.prompts_at(work, context))
        rows = list(_theirs(losses, context))
        new = set(map(_cell, rows))
        said["rows"] = [row for row in said["rows"] if _cell(row) not in new] + rows
        said["scores"] |= _named(losses, context)


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("side", "task", "context", "label", "budget"))


def _ours(results: Results) -> Iterator[dict[str, Any]]:
    rows = rows_of(results)
    dense = {(r["task"], r["context"]): r["bytes_held"] for r in rows if r["label"] == DENSE}
    for row in rows:
        if row["samples"]:
            share = row["bytes_held"] / dense[row["task"], row["context"]]
            kept = {name: _short(v) for name, v in row.items() if name not in _LEFT_OUT}
            yield {"side": OURS, **kept, "held_share": _short(share)}


def _scores(results: Results) -> dict[str, list[float]]:
    """The scores of each cell in the order of the samples, by the cell's `_key`."""
    found: dict[str, list[float]] = {}
    for r in sorted(results.samples, key=lambda r: r.sample):
        cell = r.cell
        name = _key(OURS, cell.task, cell.context, cell.label, cell.budget)
        found.setdefault(name, []).append(_short(r.score))
    return found


def _key(side: str, task: str, context: int, label: str, budget: float | None) -> str:
    return " ".join([side, task, str(context), label, *([f"{budget:g}"] if budget else [])])


def _losses(found: dict[str, Any], prompts: dict[str, Any]) -> Scores:
    """The results of the questions that were asked, by press and share, and by number."""
    asked = {q["number"]: jobs.digest(q) for q in prompts["questions"]}
    losses: Scores = {}
    for name, value in found.items():
        key = json.loads(name)
        if key["task"] == "quality" and asked.get(key["number"]) == key["digest"]:
            losses.setdefault((key["row"], key["share"]), {})[key["number"]] = value
    return losses


def _theirs(losses: Scores, context: int) -> Iterator[dict[str, Any]]:
    dense = losses.get((DENSE, None), {})
    for (press, share), mine in losses.items():
        both = sorted(mine.keys() & dense.keys())
        scores, others = ([-of[n]["nll"] for n in both] for of in (mine, dense))
        said: dict[str, Any] = {"side": THEIRS, "label": press, "task": SHARED}
        said |= {"context": context, "budget": share, "samples": len(both)}
        said |= dict(zip(_SPAN, (fmean(scores), *interval(scores)), strict=True))
        apart = (None, None, None) if press == DENSE else paired(scores, others)
        said |= dict(zip(_APART, apart, strict=True))
        said["held_share"] = fmean(mine[n]["held"] / dense[n]["held"] for n in both)
        yield {name: _short(value) for name, value in said.items()}


_SPAN = ("score", "score_low", "score_high")
_APART = ("difference", "difference_low", "difference_high")


def _named(losses: Scores, context: int) -> dict[str, list[float]]:
    return {
        _key(THEIRS, SHARED, context, press, share): [_short(-mine[n]["nll"]) for n in sorted(mine)]
        for (press, share), mine in losses.items()
    }


def _short(value: Any) -> Any:
    """A number without digits that nobody looks at; None where it is not finite.

    One value's interval, for example, is not finite.
    """
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def write(work: Path, results: Path, docs: Path) -> None:
    """Writes the JSON, the report, the figures and the page.

    Raises:
        KVPruneError: nothing was measured yet, or a file cannot be written.
    """
    said = collected(work)
    write_report(ledger.read(work), docs / FIGURES, figures=False)
    _write(said, results, docs)


def join(work: Path, results: Path, docs: Path) -> None:
    """Adds kvpress's measurements to the results that are there; the report is not changed.

    Raises:
        KVPruneError: a file cannot be written.
    """
    said = json.loads((results / NAME).read_text(encoding="utf-8"))
    _add_theirs(said, work)
    _write(said, results, docs)


def _write(said: dict[str, Any], results: Path, docs: Path) -> None:
    text = json.dumps(said, separators=(",", ":"), allow_nan=False)
    results.mkdir(parents=True, exist_ok=True)
    # One line for each row and for each cell's scores, so that a diff shows what changed.
    write_text(results / NAME, text.replace("},{", "},\n{").replace("],", "],\n") + "\n")
    for name, svg in drawn(said).items():
        write_text(docs / FIGURES / name, svg)
    write_text(docs / "comparison.md", page(said))
    print(f"written: {results / NAME}, {docs / 'comparison.md'}, {docs / FIGURES}")
