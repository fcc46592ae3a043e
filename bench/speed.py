"""Measures time, FLOPs and memory of each policy against the dense model, in one process.

    python -m bench.speed                             # all of it: 50 minutes of two slow cores
    python -m bench.speed --parts attach decode-8192  # some of it
    python -m bench.performance                       # docs/performance.md, from the results

Each part is one file, `bench/results/speed-PART.json`, written when the part is done: a run that
was stopped goes on with the parts that are missing, and `--fresh` measures all of them anew.
Candidates take turns, each turn begins with another candidate, and each is compared with the dense
run of its own turn: a machine's clock drifts more than the differences that matter. SDTP runs with
random heads of the shape of the heads that ship. The modules of `bench/costs` say what is measured
and how.

`--device cuda` measures the same on a GPU, and writes to build/speed-cuda unless told otherwise;
`python -m bench.performance --results build/speed-cuda --page build/speed-cuda/performance.md`
makes a page of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch

from .about import about
from .command import run
from .costs import attached, decode, prefill, results, stream, whole
from .costs.clock import Clock
from .costs.models import Models
from .costs.plan import Part, Sizes

ROOT = Path(__file__).parent.parent
MEASURES = {
    "attach": attached.measure,
    "prefill": prefill.measure,
    "field": prefill.measure,
    "decode": decode.measure,
    "field-step": decode.measure_field,
    "whole": whole.measure,
    "stream": stream.measure,
}


def options(given: list[str]) -> argparse.Namespace:
    """The options of the command line; refuses options that cannot be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", help="names, or groups as prefill; default: all")
    parser.add_argument("--contexts", type=int, nargs="+", default=Sizes.contexts)
    parser.add_argument("--budgets", type=int, nargs="+", default=Sizes.budgets)
    parser.add_argument("--stream", type=int, default=Sizes.stream, help="tokens, from 2,048 on")
    parser.add_argument("--new", type=int, default=Sizes.new, help="generated tokens, end to end")
    parser.add_argument("--repeats", type=int, help="turns of every part")
    parser.add_argument("--model", help="name or path; default: the demo model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fresh", action="store_true", help="measure what is there anew")
    parser.add_argument("--results", type=Path, help="default: bench/results; build/speed-DEVICE")
    asked = parser.parse_args(given)
    _check(parser, asked)
    if asked.results is None:
        on_cpu = asked.device == "cpu"
        asked.results = ROOT / ("bench/results" if on_cpu else f"build/speed-{asked.device}")
    return asked


def _check(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    if min(asked.contexts) < 128 or min(asked.budgets) < 16:
        parser.error("--contexts, --budgets: expected prompts of at least 128, budgets of 16")
    if max(asked.budgets) > max(asked.contexts):
        parser.error("--budgets: expected none above the longest of --contexts")
    repeats = 1 if asked.repeats is None else asked.repeats
    if asked.stream < 2048 or min(asked.new, asked.threads, repeats) < 1:
        parser.error("--stream: expected at least 2048; --new, --threads, --repeats: at least 1")
    names = {name for part in planned(asked, everything=True) for name in (part.name, part.group)}
    if unknown := sorted(set(asked.parts or ()) - names):
        parser.error(f"--parts: expected some of {', '.join(sorted(names))}, got {unknown}")


def planned(asked: argparse.Namespace, everything: bool = False) -> list[Part]:
    """The parts that were asked for, or all parts."""
    sizes = Sizes(asked.contexts, asked.budgets, asked.stream, asked.new, asked.repeats)
    wanted = None if everything else asked.parts
    return [p for p in sizes.parts() if wanted is None or {p.name, p.group} & set(wanted)]


class Progress:
    """Prints the time left of a run, by the time so far, at most every `EVERY` seconds."""

    EVERY = 15.0

    def __init__(self, parts: list[Part]) -> None:
        self._left = sum(part.seconds for part in parts)
        self._passed, self._start = 0.0, time.monotonic()
        self._said = self._start

    def tick(self, part: Part, share: float) -> None:
        """Notes that a share of a part is done."""
        now, passed = time.monotonic(), self._passed + share * part.seconds
        # At first there is nothing to estimate by. The end of a part is always printed.
        if passed == 0 or (share < 1 and now - self._said < self.EVERY):
            return
        self._said = now
        left = (self._left - passed) * (now - self._start) / passed
        print(f"{part.name}: {share:.0%}; {minutes(left)} left in all", flush=True)
        if share >= 1:
            self._passed = passed


def minutes(seconds: float) -> str:
    """A time in minutes, for people."""
    return f"{max(1, round(seconds / 60))} min" if seconds >= 1 else "0 min"


def measure(asked: argparse.Namespace) -> None:
    """Measures the parts that are missing.

    Raises:
        KVPruneError: the model cannot be had, or a file cannot be written.
    """
    torch.set_num_threads(asked.threads)
    clock, models = Clock(asked.device), Models(asked.model, asked.device)
    parts = planned(asked)
    todo = [p for p in parts if asked.fresh or not results.path_of(asked.results, p).exists()]
    for part in (p for p in parts if p not in todo):
        print(f"{part.name}: is there; --fresh measures it anew")
    print(f"{len(todo)} parts, about {minutes(sum(p.seconds for p in todo))} of two slow cores")
    progress = Progress(todo)
    for part in todo:
        pair = models.get(part.shape, part.dtype)
        found = MEASURES[part.kind](pair, part, clock, partial(progress.tick, part))
        results.write(asked.results, part, about(pair.plain), found)


def main() -> int:
    """Runs the command; returns its exit code."""
    asked = options(sys.argv[1:])
    return run("speed", partial(measure, asked))


if __name__ == "__main__":
    sys.exit(main())
