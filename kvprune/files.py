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


def _reach_the_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    """What new files may not be; a scratch file is for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
