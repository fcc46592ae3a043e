"""The command that gave a result, made fit to be published: without the paths of a machine."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

# An absolute path inside an argument, as in --out=/a/b, NAME=/a/b and sdtp(heads='/a/b').
# The two slashes of a URL begin no path.
_INSIDE = re.compile(r"(?<=[=:'\"(,\[\s])/(?!/)[^\s'\"()\[\],=|]+")


def command_line(arguments: Sequence[str]) -> str:
    """The arguments as one line for a shell, each of them after `without_places`."""
    return shlex.join(without_places(argument) for argument in arguments)


def without_places(text: str) -> str:
    """The text with its absolute paths shortened, so that they say nothing of the machine.

    A path below the current folder becomes relative to that folder. Any other path keeps only its
    last name.
    """
    if os.path.isabs(text):
        return _short(text)
    return _INSIDE.sub(lambda found: _short(found[0]), text)


def _short(path: str) -> str:
    """One absolute path, shortened as `without_places` says."""
    here, there = Path.cwd(), Path(os.path.normpath(path))
    if there.is_relative_to(here):
        return there.relative_to(here).as_posix()
    return there.name or path
