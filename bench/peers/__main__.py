"""Measures both sides, and writes bench/results/peers-*.json and docs/peers.md.

Each measurement is kept as soon as it is known, in build/peers: a run that was stopped goes on
where it was. After a change of code, `--fresh` measures anew. The command ends with one line and
exit code 1 where something cannot be had (kvpress, the model, the texts) or measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from bench.command import run
from kvprune.evaluation.command import command_line
from kvprune.evaluation.data.assets import demo_model
from kvprune.files import write_text

from . import jobs, table
from .environment import ROOT, peers_python
from .jobs import Job
from .merge import merged
from .plan import plan, seconds_of
from .process import run_job
from .prompts import export
from .protocol import STEPS, WARM_UP_STEPS
from .rows import DENSE, OURS, THEIRS

TASKS = ("speed", "field", "quality")


def options(given: list[str]) -> argparse.Namespace:
    """The options of the command line; refuses options that cannot be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "tasks", nargs="*", metavar="TASK", help="speed, field, quality; default: all"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--keep", type=float, default=0.25, help="speed: the share that is kept")
    parser.add_argument("--repeats", type=int, default=5, help="speed: turns")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.2], help="quality")
    parser.add_argument(
        "--asked",
        nargs="+",
        default=["inside"],
        choices=list(table.WHERE),
        help="quality: whether the question is inside what is evicted from, or read after it",
    )
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="ROW")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "peers.md")
    asked = parser.parse_args(given)
    asked.tasks = asked.tasks or list(TASKS)
    _check(parser, asked)
    return asked


def _check(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    if not set(asked.tasks) <= set(TASKS):
        parser.error(f"{asked.tasks}: expected some of {', '.join(TASKS)}")
    if not all(0 < share < 1 for share in [asked.keep, *asked.shares]):
        parser.error("--keep, --shares: expected shares above 0 and below 1")
    if min(asked.lengths) * asked.keep < 16 or min(asked.lengths) < 128:
        parser.error("--lengths: expected at least 128 tokens, of which at least 16 are kept")
    if min(asked.repeats, asked.questions, asked.threads) < 1:
        parser.error("--repeats, --questions, --threads: expected at least 1")
    if DENSE in asked.leave_out:
        parser.error(f"--leave-out {DENSE}: expected others, as this is what they are compared to")


def measure(asked: argparse.Namespace) -> None:
    """Measures both sides, and writes the results and the page.

    Raises:
        KVPruneError: something cannot be had or written, or a measurement failed.
    """
    model = demo_model(report=print)
    pythons = {OURS: Path(sys.executable), THEIRS: peers_python()}
    asked.work.mkdir(parents=True, exist_ok=True)
    prompts_file, out = asked.work / "prompts.json", asked.work / "results.jsonl"
    if asked.fresh:
        out.unlink(missing_ok=True)
    text = max(asked.lengths) + WARM_UP_STEPS + STEPS
    prompts = export(prompts_file, model, text, asked.questions)
    asked.questions = len(prompts["questions"])
    todo, found = plan(asked), jobs.read(out)
    files = [str(path) for path in (model, prompts_file, out)]
    _run_all([job for job in todo if not _done(job, prompts, found)], pythons, files)
    for task in asked.tasks:
        said = {
            "command": command_line(sys.argv[1:]),
            **merged(jobs.read(out), todo, prompts, task),
        }
        asked.results.mkdir(parents=True, exist_ok=True)
        write_text(asked.results / f"peers-{task}.json", json.dumps(said, indent=1) + "\n")
    table.write(asked.results, asked.table)
    print(f"written: {asked.results}/peers-*.json, {asked.table}")


def _done(job: Job, prompts: dict[str, Any], found: dict[str, Any]) -> bool:
    return all(jobs.name(key) in found for key in job.keys(prompts))


def _run_all(todo: list[Job], pythons: dict[str, Path], files: list[str]) -> None:
    expected, start, passed = sum(map(seconds_of, todo)), time.monotonic(), 0.0
    if not todo:
        print("all of it was measured before; --fresh measures anew")
        return
    print(f"{len(todo)} measurements, about {_minutes(expected)} on two quiet cores", flush=True)
    for number, job in enumerate(todo, 1):
        run_job(job, pythons[job.side], files)
        passed += seconds_of(job)
        # The estimate is corrected by the time that the run has taken so far.
        left = (expected - passed) * (time.monotonic() - start) / passed
        what = job.asked or f"{job.length} tokens"
        print(f"{number}/{len(todo)} {job.side} {job.task}, {what}: {_minutes(left)} left")
        sys.stdout.flush()


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))} min"


def main() -> int:
    """Runs the command; returns its exit code."""
    asked = options(sys.argv[1:])
    return run("peers", partial(measure, asked))


if __name__ == "__main__":
    sys.exit(main())
