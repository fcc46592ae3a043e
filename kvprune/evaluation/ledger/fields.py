"""The fields in the lines of a results file, checked when the lines are read."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

# Says whether a value is one that the field may have.
Fits = Callable[[Any], bool]


def _of(*kinds: type) -> Fits:
    return lambda value: type(value) in kinds


def _from(least: int) -> Fits:
    return lambda value: type(value) is int and value >= least


def _each(fits: Fits) -> Fits:
    return lambda value: type(value) is list and all(map(fits, value))


def _numbers(value: Any) -> bool:
    return type(value) is dict and all(map(_NUMBER, value.values()))


_TEXT, _NUMBER, _PERHAPS = _of(str), _of(int, float), _of(int, float, NoneType)
_COUNT, _SIZE = _from(0), _from(1)
CELL = {"policy": _TEXT, "label": _TEXT, "budget": _PERHAPS, "task": _TEXT, "context": _SIZE}
COST = {
    "prefill_seconds": _PERHAPS,
    "prefill_flops": _NUMBER,
    "decode_tokens_per_second": _PERHAPS,
    "bytes_held": _COUNT,
    "bytes_peak": _COUNT,
    "prompt_tokens": _SIZE,
    "entered": _each(_COUNT),
    "kept": _each(_PERHAPS),
    "held": _each(_PERHAPS),
}
OUTCOMES = {
    "sample": {"item": _TEXT, "sample": _COUNT, "score": _NUMBER, "parts": _numbers},
    "failure": {"error": _TEXT},
    "trace": {"sample": _COUNT, "tokens": _each(_TEXT), "kept": _each(_TEXT)},
}


def checked(given: dict[str, Any], fields: Mapping[str, Fits]) -> dict[str, Any]:
    """The dict that was given, if it has each of the fields with a value that fits.

    Raises:
        KeyError: a field is missing.
        ValueError: a field's value does not fit; the message names the field and the value.
    """
    for name, fits in fields.items():
        if not fits(given[name]):
            raise ValueError(f"{name!r} is {reprlib.repr(given[name])}")
    return given
