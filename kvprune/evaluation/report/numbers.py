"""Numbers for readers: with units that fit, and no more digits than mean something."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NONE = "–"
MINUS = "−"


@dataclass(frozen=True)
class Scale:
    """A unit.

    Attributes:
        size: how much the unit is, for example 1e9 for GFLOP.
        unit: the name of the unit.
    """

    size: float
    unit: str

    def of(self, amount: float) -> float:
        """The amount in this unit."""
        return amount / self.size


def flops_scale(amounts: Sequence[float]) -> Scale:
    """The unit in which the largest amount is a number of one to three digits."""
    most = max((a for a in amounts if math.isfinite(a)), default=0.0)
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if most >= size:
            return Scale(size, unit)
    return Scale(1e6, "MFLOP")


def digits(amounts: Sequence[float]) -> int:
    """The decimals for a column, so that its largest number has three or four digits."""
    most = max((abs(a) for a in amounts if math.isfinite(a)), default=0.0)
    return 3 if most < 1 else 2 if most < 10 else 1 if most < 1000 else 0


def number(amount: float | None, decimals: int, sign: bool = False) -> str:
    """The number as text, or a dash for a number that is missing or not finite."""
    if amount is None or not math.isfinite(amount):
        return NONE
    text = f"{amount:+,.{decimals}f}" if sign else f"{amount:,.{decimals}f}"
    # A number that rounds to zero has no sign.
    if not text.strip("+-0.,"):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def share(amount: float | None) -> str:
    """A share as per cent, with one decimal if it is not a whole number."""
    if amount is None or not math.isfinite(amount):
        return NONE
    percent = round(100 * amount, 1)
    return f"{percent:.0f} %" if percent == round(percent) else f"{percent:.1f} %"


def percent(amount: float | None) -> str:
    """A share as per cent, without decimals."""
    text = NONE if amount is None else number(100 * amount, 0)
    return text if text == NONE else f"{text} %"


def ratio(amount: float, base: float) -> str:
    """The amount as a multiple of the base."""
    return NONE if not base or math.isnan(amount / base) else f"{number(amount / base, 2)}×"


def runs(values: Sequence[float | None]) -> str:
    """Numbers by layer, equal neighbours together: `0–9: 0, 10–29: 512`."""
    found: list[tuple[int, int, str]] = []
    for layer, value in enumerate(values):
        text = number(value, 0)
        start = found.pop()[0] if found and found[-1][2] == text else layer
        found.append((start, layer, text))
    return ", ".join(f"{a}: {text}" if a == b else f"{a}–{b}: {text}" for a, b, text in found)
