"""The notebooks run from nothing to their end, and are kept as they ran."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from bench.notebooks import FOLDER, digest, executed, read

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 100_000


def test_there_are_some_and_the_page_lists_them():
    """Each by its file, and no other."""
    page = (ROOT / "docs" / "examples.md").read_text()
    named = re.findall(r"`examples/(\w+\.ipynb)`", page)
    assert len(NOTEBOOKS) == 6
    assert sorted(named) == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_ran(path):
    """In order, without an error or a warning, with a picture, and without a place on a machine."""
    notebook = read(path)
    nbformat.validate(notebook)
    said = f"run python -m bench.notebooks {path.stem}"
    assert notebook.metadata["kvprune"]["ran"] == digest(notebook), said
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert path.stat().st_size < MOST_BYTES
    assert not re.search(r"/(root|home|work|tmp|Users)/", path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    """In an empty folder; an error in a cell fails. Each cell gives outputs of the same kinds."""
    notebook, kept = read(path), read(path)
    executed(notebook)
    for cell, before in zip(notebook.cells, kept.cells, strict=True):
        if cell.cell_type == "code":
            kinds = [[out.output_type for out in one.outputs] for one in (cell, before)]
            assert kinds[0] == kinds[1]
