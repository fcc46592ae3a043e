"""Files that are whole or not there: every file that kvprune writes goes through here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import KVPruneError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write(scratch)` write a file beside `path`, and renames it there once it is complete.

    Raises:
        KVPruneError: the folder is missing or cannot be written, or the disk is full; what was
            at `path` before is still there.
    """
    scratch: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        scratch = Path(name)
        os.close(descriptor)
        write(scratch)
        _reach_the_disk(scratch)
        scratch.chmod(0o666 & ~_umask())
        os.replace(scratch, path)
    # Libraries write through code of their own: a full disk is not an OSError in all of them.
    except Exception as error:
        raise KVPruneError(
            f"{path}: expected to write this file, and could not: {error}. Make room on the disk, "
            f"or name a folder that can be written; what was there before is unchanged"
        ) from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8, whole or not at all; see `write_whole`."""
    write_whole(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def check_folder(folder: Path) -> None:
    """Refuses a folder in which nothing can be written; makes none.

    Called before work that takes long, so that it is not done in vain.

    Raises:
        KVPruneError: it is no folder, or cannot be written, or cannot be made.
    """
    place = folder.absolute()
    try:
        there = next(path for path in (place, *place.parents) if path.exists())
        why = "cannot be written" if there.is_dir() else "is a file"
        fine = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    # A name that is too long, or that no path can have.
    except (OSError, ValueError) as error:
        there, why, fine = folder, f"is no path ({error})", False
    if not fine:
        raise KVPruneError(
            f"{folder}: expected a folder that can be written, but {there} {why}. Name another"
        )


def make_folder(folder: Path) -> None:
    """Makes a folder, with those above it, unless it is there.

    Raises:
        KVPruneError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KVPruneError(f"{folder}: expected a folder that can be written ({error})") from error


def check_file(path: Path) -> None:
    """Refuses the path of a file that could not be written; writes none.

    Raises:
        KVPruneError: it is a folder, or its own folder is missing or cannot be written.
    """
    check_folder(path.parent)
    if path.is_dir() or not path.parent.is_dir():
        why = "this is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise KVPruneError(f"{path}: expected a file in a folder that is there, but {why}")


def _reach_the_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    """The permissions that new files do not get; a scratch file is for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
