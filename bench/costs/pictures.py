"""The pictures of docs/performance.md: time and memory against context, time against its limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from kvprune.evaluation.report.figures import canvas, finished, look
from kvprune.evaluation.report.palette import INK, MUTED, PAPER, styles

from .bars import MB
from .candidates import BOTH, DENSE, NAMES, PRUNED
from .models import LAYER
from .numbers import ratios
from .results import Found, groups

STYLE = styles(NAMES)

AGAINST_CONTEXT: dict[str, tuple[str, str, Callable[[dict[str, Any]], float]]] = {
    "time": ("Prefill", "prefill, s", lambda row: statistics.median(row["prefill"])),
    "live": ("Memory while reading", "live tensors, MB", lambda row: row["live"] / MB),
    "held": ("Memory afterwards", "KV cache held, MB", lambda row: row["held"] / MB),
}
"""The title, the axis, and the number of a candidate's row that is drawn, by file name."""


def pictures(found: list[Found]) -> Iterator[tuple[str, str, str]]:
    """The name, the description and the SVG of each picture that there are results for."""
    real = list(groups(found, "prefill"))
    if len(real) > 1:
        for name in AGAINST_CONTEXT:
            yield _against_context(name, real)
    if measured := [*real, *groups(found, "layer")]:
        yield _against_limit(measured)


def _against_context(name: str, found: list[Found]) -> tuple[str, str, str]:
    title, axis, of = AGAINST_CONTEXT[name]
    contexts = [one["part"]["context"] for one in found]
    with look(name):
        figure, axes = canvas(title, 2.2, _legend(NAMES))
        for label in NAMES:
            axes.plot(contexts, [of(one["found"][label]) for one in found], **_look(label))
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.set(xlabel="context, tokens", ylabel=axis, xlim=(0, 1.05 * contexts[-1]))
        axes.set_ylim(bottom=0)
        return name, f"{title}: {axis} against context", finished(figure, name, title).svg


def _against_limit(found: list[Found]) -> tuple[str, str, str]:
    """The picture of time against its limit: the real model filled, layers of a 7B model hollow."""
    name, title = "limit", "Time to dense against FLOPs to dense"
    with look(name):
        figure, axes = canvas(title, 2.6, _legend((PRUNED, BOTH)))
        low = 1.0
        for label in (PRUNED, BOTH):
            for one in found:
                rows, hollow = one["found"], one["part"]["shape"] == LAYER
                limit = rows[label]["flops"] / rows[DENSE]["flops"]
                time = ratios(rows[label]["prefill"], rows[DENSE]["prefill"]).median
                face = {"markerfacecolor": PAPER, "markeredgecolor": STYLE[label].colour}
                axes.plot([limit], [time], **_look(label) | (face if hollow else {}))
                axes.annotate(f"{one['part']['context']:,}", (limit, time), (4, 3),
                              textcoords="offset points", fontsize=7, color=MUTED)  # fmt: skip
                low = min(low, limit, time)
        axes.axline((1, 1), slope=1, color=INK, linewidth=0.9)
        axes.axline((0, 0), slope=1.05, color=MUTED, linewidth=0.9, linestyle=":")
        axes.set(xlabel="FLOPs to dense", ylabel="time to dense")
        axes.set(xlim=(low - 0.03, 1.0), ylim=(low - 0.03, 1.1))
        said = f"{title}; the line is the limit, dotted 1.05 of it; hollow: layers of a 7B model"
        return name, said, finished(figure, name, title).svg


def _legend(labels: tuple[str, ...]) -> list[tuple[Any, str]]:
    from matplotlib.lines import Line2D

    return [(Line2D([], [], **_look(label)), label) for label in labels]


def _look(label: str) -> dict[str, Any]:
    style = STYLE[label]
    return {
        "color": style.colour,
        "marker": style.marker,
        "markersize": 5.5,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.8,
        "linewidth": 1.1,
    }
