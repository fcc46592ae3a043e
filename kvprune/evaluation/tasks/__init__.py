"""The tasks of a comparison, one file each; `base.py` says what a task is."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable

from ...errors import KVPruneError
from .articles import HotpotQA, Squad
from .base import Task
from .kv import KeyValue
from .needles import MultiNeedle, Needle
from .own import own
from .perplexity import Perplexity
from .tracking import Tracking
from .words import Words

_MAKE: dict[str, Callable[[], Task]] = {
    made.name: made
    for made in (Needle, MultiNeedle, Tracking, Words, KeyValue, HotpotQA, Squad, Perplexity)
}

TASKS: tuple[str, ...] = tuple(_MAKE)
"""The names of the tasks that are here."""


def task(name_or_path: str) -> Task:
    """The task with this name, or the task of a file of JSON lines (see `own.py`).

    Raises:
        KVPruneError: there is no such task or file, or the file is not as it has to be.
    """
    if name_or_path in _MAKE:
        return _MAKE[name_or_path]()
    # A path to a missing file goes to `own` too, whose error then names the file.
    if os.path.exists(name_or_path) or os.sep in name_or_path or ".json" in name_or_path:
        return own(name_or_path)
    near = difflib.get_close_matches(name_or_path, TASKS, n=1)
    raise KVPruneError(
        f"task: expected one of {', '.join(TASKS)}, or a path to JSON lines, got {name_or_path!r}"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )
