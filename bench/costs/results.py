"""The files of results, one for each part; a file is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvprune.files import write_text

from .plan import Part

START = "speed-"

Found = dict[str, Any]
"""The results of a part, with these keys:

* about: see `bench.about`.
* part: the fields of a `Part`.
* found: the results that the part's `measure` gave.
"""


def path_of(folder: Path, part: Part) -> Path:
    """The file of a part's results."""
    return folder / f"{START}{part.name}.json"


def write(folder: Path, part: Part, about: dict[str, Any], found: dict[str, Any]) -> None:
    """Writes the results of a part.

    Raises:
        KVPruneError: the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    said = {"about": about, "part": asdict(part), "found": _rounded(found)}
    write_text(path_of(folder, part), json.dumps(said) + "\n")


def read(folder: Path) -> list[Found]:
    """All parts of a folder, the shortest context first."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{START}*.json"))]
    return sorted(found, key=lambda one: one["part"]["context"])


def groups(found: list[Found], *names: str) -> Iterator[Found]:
    """The results of the parts of some groups."""
    return (one for one in found if Part(**one["part"]).group in names)


def the_one(found: list[Found], name: str) -> Found | None:
    """The results of a group's longest part; None if the group was not measured."""
    return next(reversed(list(groups(found, name))), None)


def _rounded(value: Any) -> Any:
    """The value with seconds to a tenth of a microsecond: smaller differences are noise."""
    if isinstance(value, float):
        return round(value, 7)
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value
