"""Runs the notebooks of examples/, and keeps them as they ran.

    python -m bench.notebooks                 # all of them: six minutes of two cores
    python -m bench.notebooks first_run

Each runs in an empty folder. What it printed and drew is written into it, without warnings, and a
digest of its cells, by which `tests/examples/test_notebooks.py` sees that none was changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "examples"
SECONDS = 1200
"""The most that a cell may take."""


def read(path: Path) -> Any:
    """The notebook in a file."""
    return nbformat.read(path, as_version=4)


def digest(notebook: Any) -> str:
    """Of its cells' sources."""
    text = "\0".join(cell.source for cell in notebook.cells)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def executed(notebook: Any) -> None:
    """Runs a notebook, and keeps what it printed and drew.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        options: dict[str, Any] = {
            "timeout": SECONDS,
            "kernel_name": "python3",
            "coalesce_streams": True,
        }
        NotebookClient(notebook, resources=place, **options).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    # The kernel's version says nothing to a reader.
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["kvprune"] = {"ran": digest(notebook)}


def main() -> None:
    """Runs those that are named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]
    parser.add_argument("names", nargs="*", default=names, help=", ".join(names))
    asked = parser.parse_args().names
    if missing := sorted(set(asked) - set(names)):
        parser.error(f"{missing}: expected some of {', '.join(names)}")
    for name in asked:
        path = FOLDER / f"{name}.ipynb"
        notebook = read(path)
        executed(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: it ran", flush=True)


if __name__ == "__main__":
    main()
