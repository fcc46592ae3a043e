"""Colours and markers that all readers can tell apart, on light paper and on a dark screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The colours of Okabe and Ito (2008), darkened where too pale for white; without their yellow.
SERIES = {
    "#0072b2": "#5aa9e6",
    "#d55e00": "#ff8c42",
    "#00805a": "#35c796",
    "#b0448f": "#e592cc",
    "#a67c00": "#e3b93c",
    "#2b9cc4": "#86d7f5",
    "#6b4fa0": "#ab93e6",
    "#7a4b2a": "#c99a75",
}
"""The colour of each series on white, and the colour that replaces it on a dark ground."""

INK = "#1c2128"
MUTED = "#59636e"
GRID = "#d8dee4"
PAPER = "#fefefe"
GROUND = {INK: "#e6edf3", MUTED: "#9aa4af", GRID: "#30363d", PAPER: "#10151b"}
"""The colours of everything else, with those that replace them on a dark ground."""

# Nine, so that colour and marker together repeat only after 72 policies.
MARKERS = "osD^vPX<>"


@dataclass(frozen=True)
class Style:
    """The look of one policy in every figure."""

    colour: str
    marker: str


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """The style of each policy, by its place in the list."""
    colours = list(SERIES)
    return {
        label: Style(colours[i % len(colours)], MARKERS[i % len(MARKERS)])
        for i, label in enumerate(labels)
    }


def dark_rules() -> str:
    """CSS rules that change figures, drawn in the colours for white, on a dark screen.

    The rules match the text that matplotlib writes into `style`. So the files stay plain SVG for
    programs that know no media queries.
    """
    rules = (
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in {**SERIES, **GROUND}.items()
        for what in ("fill", "stroke")
    )
    return f"@media screen and (prefers-color-scheme: dark){{{''.join(rules)}}}"
