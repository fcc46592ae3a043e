"""Colours and markers that everybody can tell apart, on light paper and on a dark screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Of Okabe and Ito (2008), darkened where they are too pale for white; without their yellow.
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
"""Each colour on white, and what takes its place on a dark ground."""

INK = "#1c2128"
MUTED = "#59636e"
GRID = "#d8dee4"
PAPER = "#fefefe"
GROUND = {INK: "#e6edf3", MUTED: "#9aa4af", GRID: "#30363d", PAPER: "#10151b"}
"""What is not of a series, likewise."""

# Nine, so that colour and marker together repeat only after 72 policies.
MARKERS = "osD^vPX<>"


@dataclass(frozen=True)
class Style:
    """How one policy looks in every figure."""

    colour: str
    marker: str


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each policy, by its place."""
    colours = list(SERIES)
    return {
        label: Style(colours[i % len(colours)], MARKERS[i % len(MARKERS)])
        for i, label in enumerate(labels)
    }


def dark_rules() -> str:
    """CSS by which figures follow a dark screen; they are drawn in the colours for white.

    It goes by what matplotlib writes into `style`, so that the files stay plain SVG for programs
    that know no media queries.
    """
    rules = (
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in {**SERIES, **GROUND}.items()
        for what in ("fill", "stroke")
    )
    return f"@media screen and (prefers-color-scheme: dark){{{''.join(rules)}}}"
