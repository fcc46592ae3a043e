"""The figures of a report: quality against cost, cost against context, and slots by layer."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ledger.results import Trace
from ..measure.traces import MOST, levels
from .figures import LONGEST_TITLE, Plot, canvas, finished, look, shortened
from .numbers import Scale, flops_scale, share
from .palette import INK, MUTED, PAPER, Style
from .pareto import front
from .summary import LOWER, CellCost, Row, Span, Table

DENSE_STYLE = Style(INK, "*")
BINS = 512
"""The most columns of a heat map's image: neighbours share one beyond that."""

MB = Scale(1e6, "MB")


def slug(*parts: object) -> str:
    """A file name made of words with any characters: a task can be a path."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, parts)).lower()).strip("-")[:80]


def quality_plots(table: Table, style: dict[str, Style], number: int) -> list[Plot]:
    """The score against bytes held, and against prefill FLOPs, each with its Pareto front."""
    rows = [row for row in table.rows if row.cell.policy != LOWER]
    if not rows:
        return []
    flops = flops_scale([row.cost.flops for row in rows])
    kinds: list[tuple[str, str, Callable[[CellCost], float]]] = [
        ("bytes", "KV cache held, MB", lambda cost: MB.of(cost.held)),
        ("flops", f"prefill, {flops.unit}", lambda cost: flops.of(cost.flops)),
    ]
    place = (number, table.task, table.context)
    return [
        _quality(table, rows, style, of, axis, slug("quality", kind, *place))
        for kind, axis, of in kinds
    ]


def _quality(
    table: Table,
    rows: Sequence[Row],
    style: dict[str, Style],
    of: Callable[[CellCost], float],
    axis: str,
    name: str,
) -> Plot:
    named = {row.cell.label: row for row in rows}
    title = f"{shortened(table.task, 30)}, {table.context:,} tokens"
    with look(name):
        figure, axes = canvas(title, 2.5, _legend(list(named), style, table.lower is not None))
        for label in named:
            mine = [row for row in rows if row.cell.label == label]
            points = [(of(row.cost), row.score) for row in mine]
            _series(axes, sorted(points, key=lambda p: p[0]), _style(label, style))
        _front(axes, [(of(row.cost), row.score.mean) for row in rows])
        if table.lower is not None:
            axes.axhline(table.lower.score.mean, color=MUTED, linestyle=":", linewidth=1.2)
        axes.set(xlabel=axis, ylabel=table.unit)
        # Room for a ring around the last point.
        axes.set_xlim(0, 1.06 * max(of(row.cost) for row in rows) or 1)
        return finished(figure, name, f"{title}: {table.unit} against {axis}")


def _style(label: str, style: dict[str, Style]) -> Style:
    return style.get(label, DENSE_STYLE)


def _series(axes: Any, points: Sequence[tuple[float, Span]], style: Style) -> None:
    """Draws a policy's budgets, joined by a line, each with its interval."""
    for x, score in points:
        if score.low is not None:
            axes.plot([x, x], [score.low, score.high], color=style.colour, alpha=0.45, linewidth=1)
    axes.plot([x for x, _ in points], [score.mean for _, score in points], **_look(style))


def _look(style: Style) -> dict[str, Any]:
    size = 9 if style.marker == "*" else 5.5
    return {
        "color": style.colour,
        "marker": style.marker,
        "markersize": size,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.6,
        "linewidth": 1.1,
    }


def _front(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Draws a stair through the points of the front, and a ring around each point."""
    best = sorted({p for p, on in zip(points, front(points), strict=True) if on})
    if not best:
        return
    x, y = zip(*best, strict=True)
    axes.plot(x, y, color=INK, alpha=0.35, linewidth=3.5, drawstyle="steps-post", zorder=1)
    axes.plot(x, y, **_RING)


_RING: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 10.5,
    "markerfacecolor": "none",
    "markeredgecolor": INK,
    "markeredgewidth": 0.9,
}


def _legend(
    labels: Sequence[str], style: dict[str, Style], lower: bool, best: bool = True
) -> list[tuple[Any, str]]:
    from matplotlib.lines import Line2D

    entries = [(Line2D([], [], **_look(_style(label, style))), label) for label in labels]
    if lower:
        entries.append((Line2D([], [], color=MUTED, linestyle=":", linewidth=1.2), LOWER))
    if best:
        entries.append((Line2D([], [], **_RING), "Pareto front"))
    return entries


def context_plots(tables: Sequence[Table], style: dict[str, Style]) -> list[Plot]:
    """Bytes held and prefill seconds against context, for each budget; means over the tasks."""
    rows = [row for table in tables for row in table.rows if row.cell.policy != LOWER]
    # A single context makes no line.
    if len({row.cell.context for row in rows}) < 2:
        return []
    given = {r.cell.budget for r in rows if r.cell.budget is not None}
    budgets: list[float | None] = [*sorted(given, reverse=True)] or [None]
    kinds: list[tuple[str, str, Callable[[CellCost], float]]] = [
        ("memory", "KV cache held, MB", lambda cost: MB.of(cost.held)),
        ("time", "prefill, s", lambda cost: cost.seconds),
    ]
    return [
        _context([r for r in rows if r.cell.budget in (None, budget)], budget, style, *kind)
        for budget in budgets
        for kind in kinds
    ]


def _context(
    rows: Sequence[Row],
    budget: float | None,
    style: dict[str, Style],
    kind: str,
    axis: str,
    of: Callable[[CellCost], float],
) -> Plot:
    labels = list(dict.fromkeys(row.cell.label for row in rows))
    name = slug("context", kind, "" if budget is None else share(budget))
    title = "all tasks" if budget is None else f"budget {share(budget)}, all tasks"
    contexts = sorted({row.cell.context for row in rows})
    with look(name):
        figure, axes = canvas(title, 2.2, _legend(labels, style, False, best=False))
        for label in labels:
            mine = [row for row in rows if row.cell.label == label]
            axes.plot(*_means(mine, of), **_look(_style(label, style)))
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.set(xlabel="context, tokens", ylabel=axis)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 1.06 * contexts[-1])
        return finished(figure, name, f"{title}: {axis} against context")


def _means(rows: Sequence[Row], of: Callable[[CellCost], float]) -> tuple[list[int], list[float]]:
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row.cell.context, []).append(of(row.cost))
    contexts = sorted(found)
    return contexts, [statistics.fmean(found[context]) for context in contexts]


def heat_map(trace: Trace, style: Style, number: int) -> Plot:
    """The columns that each layer holds: the stronger the colour, the more heads hold them."""
    name = slug("kept", number, trace.cell.label)
    budget = "" if trace.cell.budget is None else f", budget {share(trace.cell.budget)}"
    title = shortened(trace.cell.label, LONGEST_TITLE - len(budget)) + budget
    shown = binned(levels(trace) / MOST)
    count, columns = len(shown), len(trace.tokens)
    with look(name):
        figure, axes = canvas(title, 1.1)
        box = (0, columns, -0.5, max(count, 1) - 0.5)
        axes.imshow(
            _tinted(shown, style.colour), extent=box, origin="lower", aspect="auto",
            interpolation="none",
        )  # fmt: skip
        axes.set(xlabel="column", ylabel="layer", xlim=box[:2], ylim=box[2:])
        axes.grid(False)
        return finished(figure, name, f"{title}: columns that each layer holds")


def binned(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values `[layers, n]`, with at most `BINS` columns: means of neighbours."""
    count = values.shape[1]
    width = max(1, -(-count // BINS))
    starts = np.arange(0, count, width)
    sizes = np.diff([*starts, count])
    return np.add.reduceat(values, starts, axis=1) / sizes if count else values


def _tinted(values: NDArray[np.float64], colour: str) -> NDArray[np.uint8]:
    """An RGBA image of values `[layers, n]`: one colour, as opaque as the value."""
    image = np.zeros((max(values.shape[0], 1), max(values.shape[1], 1), 4), np.uint8)
    image[..., :3] = list(bytes.fromhex(colour[1:]))
    image[: values.shape[0], : values.shape[1], 3] = np.rint(255 * values)
    return image
