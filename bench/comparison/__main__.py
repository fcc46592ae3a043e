"""Measures both sides, and writes the report, bench/results/comparison.json and the page.

Each measurement is kept as soon as it is known, in build/comparison: a run that was stopped goes
on where it was. Something that cannot be had or measured ends the command with one line and exit
code 1. `presses` measures kvpress's side alone, and joins it to the results that are there.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from bench.command import run
from bench.peers.environment import ROOT, peers_python
from kvprune.evaluation.data.assets import demo_model

from . import ours, theirs
from .settings import CONTEXTS, PRESSES, SAMPLES, SHARED, stages

WHAT = ("measure", "page")
PRESSES_ALONE = "presses"


def options(given: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.comparison", description=__doc__)
    parser.add_argument("what", nargs="*", choices=[*WHAT, PRESSES_ALONE, []], help="default: both")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each cell")
    parser.add_argument("--context", type=int, nargs="*", default=list(CONTEXTS), help=SHARED)
    parser.add_argument("--needle", type=int, nargs="*", default=list(CONTEXTS), help="contexts")
    parser.add_argument("--peers", type=int, nargs="*", default=[CONTEXTS[0]], help="kvpress's")
    parser.add_argument("--presses", nargs="+", default=list(PRESSES), choices=list(PRESSES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="default: the demo model")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "comparison")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    asked = parser.parse_args(given)
    asked.what = asked.what or list(WHAT)
    return asked


def measure(asked: argparse.Namespace) -> None:
    """Measures what is not there yet: the shared task, kvpress on it, then the rest.

    Raises:
        KVPruneError: something cannot be had, or a measurement failed.
    """
    torch.set_num_threads(asked.threads)
    model = asked.model or demo_model(report=print)
    asked.work.mkdir(parents=True, exist_ok=True)
    todo = stages(asked)
    for stage in [s for s in todo if s[0] == SHARED]:
        ours.measure(asked, *stage, asked.work)
    _presses(asked, model)
    for stage in [s for s in todo if s[0] != SHARED]:
        ours.measure(asked, *stage, asked.work)


def _presses(asked: argparse.Namespace, model: Path) -> None:
    for context in asked.peers:
        theirs.measure(asked, model, peers_python(), asked.work, context)


def make(asked: argparse.Namespace) -> None:
    """Measures and writes what was asked for.

    Raises:
        KVPruneError: something cannot be had, measured or written.
    """
    if "measure" in asked.what:
        measure(asked)
    if "page" in asked.what:
        from .collect import write

        write(asked.work, asked.results, asked.docs)
    if PRESSES_ALONE in asked.what:
        from .collect import join

        torch.set_num_threads(asked.threads)
        asked.work.mkdir(parents=True, exist_ok=True)
        _presses(asked, asked.model or demo_model(report=print))
        join(asked.work, asked.results, asked.docs)


def main() -> int:
    """Runs the command; returns its exit code."""
    asked = options(sys.argv[1:])
    return run("comparison", partial(make, asked))


if __name__ == "__main__":
    sys.exit(main())
