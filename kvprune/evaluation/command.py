"""The command that gave a result, as it may be published: without the paths of a machine."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

# An absolute path inside an argument, as in --out=/a/b, NAME=/a/b and sdtp(heads='/a/b').
# Not the two slashes of a URL.
_INSIDE = re.compile(r"(?<=[=:'\"(,\[\s])/(?!/)[^\s'\"()\[\],=|]+")


def command_line(arguments: Sequence[str]) -> str:
    """Arguments as a shell takes them, each `without_places`."""
    return shlex.join(without_places(argument) for argument in arguments)


def without_places(text: str) -> str:
    """A text whose absolute paths say nothing of the machine that they are on.

    A path below the current folder becomes relative to it; of any other only the last name stays.
    """
    if os.path.isabs(text):
        return _short(text)
    return _INSIDE.sub(lambda found: _short(found[0]), text)


def _short(path: str) -> str:
    here, there = Path.cwd(), Path(os.path.normpath(path))
    if there.is_relative_to(here):
        return there.relative_to(here).as_posix()
    return there.name or path
