"""kvprune's side: `kvprune compare`, one call for each task and context."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from kvprune.cli import app
from kvprune.errors import KVPruneError

from .settings import BUDGETS, POLICIES


def arguments(asked: Namespace, task: str, context: int, out: Path) -> list[str]:
    """The arguments of one call of `kvprune compare`."""
    given = {
        "--policies": POLICIES,
        "--tasks": [task],
        "--context": [context],
        "--budgets": BUDGETS,
        "--samples": [asked.samples],
        "--dtype": ["float32"],
        "--executor": ["shared"],
        "--out": [out],
        "--model": [asked.model] if asked.model else [],
    }
    return ["compare", *(str(x) for name, of in given.items() if of for x in (name, *of))]


def measure(asked: Namespace, task: str, context: int, out: Path) -> None:
    """Runs a task at a context; cells that are there already are not run again.

    Raises:
        KVPruneError: a cell failed, or `compare` raised it.
        KeyboardInterrupt: the run was stopped.
    """
    given = arguments(asked, task, context, out)
    # The results file takes from here which command was run.
    sys.argv = ["kvprune", *given]
    print(f"kvprune {task} at {context} tokens", flush=True)
    status = app(given, standalone_mode=False)
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise KVPruneError(f"comparison: cells of {task} failed, as said above: call it again")
