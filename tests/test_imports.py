"""Imports run one way: a folder imports from folders below it alone, and files form no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kvprune

PACKAGE = Path(kvprune.__file__).parent
LEVELS = [
    {"errors"},
    {"files", "threads"},
    {"models", "statistics"},
    {"policy", "attention"},
    {"storage"},
    {"positions"},
    {"engine"},
    {"cache"},
    {"wiring"},
    {"policies"},
    {"testing"},
    {"evaluation"},
    {"cli"},
    {"__main__"},
]
"""What kvprune consists of, the lowest first; parts of one level know nothing of each other."""
FOR_POLICIES = {"policy", "statistics", "errors"}
"""What policies may import; training one (policies/sdtp) takes more."""
LAZY = {("policy.base", "policy.composition")}
"""Imports inside a function, which would be a circle: `a | b` makes a union, which is a policy."""


def name_of(path: Path) -> str:
    """A module's name below kvprune; that of an `__init__` is its folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """The modules of the package itself: no policies, and not the front door."""
    found = {name_of(path): path for path in PACKAGE.rglob("*.py") if "policies" not in path.parts}
    return {name: path for name, path in found.items() if name}


def imported(path: Path) -> Iterator[str]:
    """The modules of kvprune that a file imports, also for types alone or within a function."""
    package = ["kvprune", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("kvprune.") for a in node.names if "kvprune." in a.name)
        if not isinstance(node, ast.ImportFrom):
            continue
        start = package[: len(package) - node.level + 1] if node.level else []
        source = [*start, *(node.module or "").split(".")]
        source = [part for part in source if part]
        if source[:1] != ["kvprune"]:
            continue
        for alias in node.names:
            whole = ".".join([*source[1:], alias.name])
            yield whole if whole in modules() else ".".join(source[1:]) or whole


def level(name: str) -> int:
    """The place of a module's folder, from below; policies are what everybody may hand around."""
    folder = name.split(".")[0]
    (found,) = (i for i, parts in enumerate(LEVELS) if folder in parts)
    return found


@pytest.mark.parametrize("name", modules())
def test_nothing_is_imported_upwards(name):
    """Nor from another part of the same level."""
    for other in imported(modules()[name]):
        same = name.split(".")[0] == other.split(".")[0]
        assert same or level(other) < level(name), f"{name} imports {other}"


def test_no_circle():
    """Of files, in all of the package."""
    graph = {
        name: {o for o in imported(path) if o != name and (name, o) not in LAZY}
        for name, path in modules().items()
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


FILES = [p for p in PACKAGE.joinpath("policies").glob("*.py") if p.stem != "__init__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_policies_know_what_authors_read_alone(path):
    """A file of one policy imports nothing of the engine; it may build on another policy."""
    for other in imported(path):
        assert other.split(".")[0] in {*FOR_POLICIES, "policies"}, f"{path.name} imports {other}"
