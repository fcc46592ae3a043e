"""Figures as SVG and PNG: all of one width and one look, with text that stays text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import KVPruneError
from .palette import GRID, GROUND, INK, MUTED, PAPER, dark_rules

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sizes in inches, of 72 points. A figure is as wide as a phone, so that its text is never shrunk to
# fit.
WIDTH, LEFT, RIGHT = 5.0, 0.66, 0.24
TITLE, AXIS, LINE = 0.34, 0.5, 0.168
DOTS = 200
LONGEST_LABEL, LONGEST_TITLE = 66, 50

_LOOK: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
}

_FONT = "text{font-family:system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif!important}"


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        name: the name of its files, without their ending.
        title: what the figure shows, in words.
        svg: a file of its own, which follows a dark screen.
        inline: the same for a page that has `dark_rules` in its style sheet.
        png: the figure on white.
    """

    name: str
    title: str
    svg: str
    inline: str
    png: bytes


def need_matplotlib() -> None:
    """Checks that figures can be drawn.

    Raises:
        KVPruneError: matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise KVPruneError(
            f"report: expected matplotlib, which draws the figures: {error}; mend it with: "
            f"pip install kvprune[compare]"
        ) from error


@contextmanager
def look(name: str) -> Iterator[None]:
    """Gives figures that are drawn inside the context the look of the report.

    Args:
        name: keeps the ids in a figure's SVG apart from those of other figures.
    """
    import matplotlib

    with matplotlib.rc_context({**_LOOK, "svg.hashsalt": name}):
        yield


def canvas(
    title: str, height: float, legend: Sequence[tuple[Any, str]] = ()
) -> tuple[Figure, Axes]:
    """A figure of the usual width.

    Args:
        title: the title above the axes.
        height: the height of the axes, in inches.
        legend: handles and labels of a legend below the axes.

    Returns:
        the figure and its axes.
    """
    from matplotlib.figure import Figure

    names = [shortened(label, LONGEST_LABEL) for _, label in legend]
    # Short labels fit side by side.
    columns = 2 if max(map(len, names), default=0) <= 30 and len(names) > 1 else 1
    below = AXIS + LINE * -(-len(names) // columns) + (0.06 if names else 0)
    whole = TITLE + height + below
    figure = Figure(figsize=(WIDTH, whole))
    place = (LEFT / WIDTH, below / whole, (WIDTH - LEFT - RIGHT) / WIDTH, height / whole)
    axes = figure.add_axes(place)
    axes.set_title(shortened(title, LONGEST_TITLE), color=INK)
    if names:
        figure.legend(
            [handle for handle, _ in legend], names, loc="lower left", ncols=columns,
            bbox_to_anchor=(0.01, 0), borderpad=0.2, labelspacing=0.35, handlelength=2.2,
        )  # fmt: skip
    return figure, axes


def shortened(text: str, length: int) -> str:
    """The text on one line, its middle left out if it is too long.

    Characters that XML cannot hold become spaces.
    """
    text = "".join(c if c.isprintable() else " " for c in text)
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]} … {text[len(text) - half :]}"


def finished(figure: Figure, name: str, title: str) -> Plot:
    """Both kinds of file of a figure; to be called inside `look(name)`."""
    vector, pixels = io.StringIO(), io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(vector, format="svg", facecolor="none", metadata=nothing)
    figure.savefig(pixels, format="png", facecolor="white", dpi=DOTS)
    svg = _bare(vector.getvalue())
    return Plot(name, title, _alone(svg), _inside(svg), pixels.getvalue())


def _bare(svg: str) -> str:
    """The SVG without document type, ids that nothing refers to, and digits that nobody sees."""
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    svg = re.sub(r">\s+<", "><", svg)
    return re.sub(r"<[^>]*>", lambda tag: _short(tag[0]), svg)


def _short(tag: str) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\s+", " ", tag))


def _alone(svg: str) -> str:
    dark = f"svg{{background:{GROUND[PAPER]}}}"
    style = f"{_FONT}svg{{background:#fff}}@media screen and (prefers-color-scheme: dark){{{dark}}}"
    return svg.replace("<defs>", f"<defs><style>{style}{dark_rules()}</style>", 1)


def _inside(svg: str) -> str:
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    # The page's own style sheet has these rules once for all figures.
    rest = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", rest, count=1, flags=re.DOTALL)
    rest = rest.replace("xlink:href", "href")
    return f'<svg {box[0]} aria-hidden="true">{rest}'
