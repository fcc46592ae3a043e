"""The results file: JSON lines, each written whole and for good, so that a run can stop anywhere.

The first line, of kind "run", says what was run; more lines of kind "command" are what was run on
the same file later. "task" and "policy" say what is to be known of these, and "sample", "failure"
and "trace" are the dataclasses of `results`. A sample's `item` is a digest of what was asked, and
a policy's `modules` one of the learned modules in it, so that results of other data or of other
weights are not taken for these.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kvprune.errors import KVPruneError

from .results import Cell, Cost, Failure, Results, SampleResult, Trace

NAME = "results.jsonl"
LOCK = ".results.lock"
IDENTITY = ("format", "digest", "seed", "dtype", "device", "versions")
"""What all results of one file have in common."""
FORMAT = 1
_BEGIN = b'{"kind": "'

Outcome = SampleResult | Failure | Trace
Key = tuple[str, float | None, str, int]


def key_of(cell: Cell) -> Key:
    """What tells cells apart, however their policies were spelled."""
    return cell.policy, cell.budget, cell.task, cell.context


@dataclass
class Ledger:
    """A results file and what it says; made by `opened`, which keeps others out.

    run: its first line; empty in a new file. units, floors: by task. modules: by policy.
    items: by task, context and number of a sample, the digest of what was asked.
    size: bytes of its whole lines; what a killed or failed write left behind them is dropped with
        the next one.
    """

    path: Path
    run: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    items: dict[tuple[str, int, int], str] = field(default_factory=dict)
    samples: dict[tuple[Key, int], SampleResult] = field(default_factory=dict)
    failures: dict[Key, Failure] = field(default_factory=dict)
    traces: dict[Key, Trace] = field(default_factory=dict)
    size: int = 0

    @property
    def results(self) -> Results:
        """All that it says."""
        return Results(
            {**self.run, "command": " && ".join(self.commands)} if self.run else {},
            dict(self.units),
            tuple(self.samples.values()),
            tuple(self.failures.values()),
            tuple(self.traces.values()),
            dict(self.floors),
        )

    def check(self, run: Mapping[str, Any]) -> None:
        """Refuses to go on with a file of another run.

        Raises:
            KVPruneError: naming what differs.
        """
        if not self.run:
            return
        differ = [name for name in IDENTITY if self.run.get(name) != run.get(name)]
        if differ:
            came = "; ".join(f"{n} {self.run.get(n)!r}, not {run.get(n)!r}" for n in differ)
            raise KVPruneError(
                f"{self.path}: expected results of this run, and these are of another: {came} "
                f"(its model is {self.run.get('model')!r}). Name another folder with --out"
            )

    def check_item(self, task: str, context: int, number: int, digest: str) -> None:
        """Refuses results of other data.

        Raises:
            KVPruneError: the sample of this number was another.
        """
        if self.items.get((task, context, number), digest) != digest:
            raise KVPruneError(
                f"{self.path}: expected results of the same samples, and number {number} of "
                f"{task} at {context} tokens was another: the task's data, its code or the "
                f"tokenizer has changed. Name another folder with --out"
            )

    def check_modules(self, policy: str, digest: str) -> None:
        """Refuses results of other learned modules.

        Raises:
            KVPruneError: the policy had others.
        """
        if self.modules.get(policy, digest) != digest:
            raise KVPruneError(
                f"{self.path}: expected results of the same weights, and those of {policy} have "
                f"changed. Name another folder with --out"
            )

    def begin(self, run: Mapping[str, Any]) -> None:
        """Writes what is run, unless that is what was run before."""
        if not self.run:
            self._write("run", run)
        elif run["command"] not in self.commands:
            self._write("command", {"command": run["command"], "date": run["date"]})

    def note_task(self, name: str, unit: str, floor: float | None) -> None:
        """Writes what is to be known of a task, once."""
        if name not in self.units:
            self._write("task", {"name": name, "unit": unit, "floor": floor})

    def note_modules(self, policy: str, digest: str) -> None:
        """Writes the digest of a policy's modules, once."""
        if policy not in self.modules:
            self._write("policy", {"policy": policy, "modules": digest})

    def add(self, outcome: Outcome, item: str = "") -> None:
        """Writes a sample (with the digest of what was asked), a failure or a trace."""
        if isinstance(outcome, SampleResult):
            self._write("sample", {"item": item, **asdict(outcome)})
        else:
            self._write("failure" if isinstance(outcome, Failure) else "trace", asdict(outcome))

    def done(self, cell: Cell) -> set[int]:
        """The samples of a cell that are there."""
        key = key_of(cell)
        return {number for other, number in self.samples if other == key}

    def _write(self, kind: str, content: Mapping[str, Any]) -> None:
        """Appends a line that is on the disk when this returns."""
        line = json.dumps({"kind": kind, **content}) + "\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                file.truncate(self.size)
                _all_of(file, line.encode())
                os.fsync(file.fileno())
        except OSError as error:
            raise KVPruneError(
                f"{self.path}: expected to write this file, and could not: {error}. Make room on "
                f"the disk and start again: what is finished is kept"
            ) from error
        self.size += len(line)
        self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        """Takes in one line."""
        kind = line.pop("kind")
        if kind == "run":
            self.run, self.commands = line, [line["command"]]
        elif kind == "command":
            self.commands.append(line["command"])
        elif kind == "task":
            self.units[line["name"]] = line["unit"]
            self.floors |= {} if line["floor"] is None else {line["name"]: line["floor"]}
        elif kind == "policy":
            self.modules[line["policy"]] = line["modules"]
        else:
            self._take_outcome(kind, line, Cell(**line.pop("cell")))

    def _take_outcome(self, kind: str, line: dict[str, Any], cell: Cell) -> None:
        key = key_of(cell)
        if kind == "sample":
            self.items[cell.task, cell.context, line["sample"]] = line.pop("item")
            tuples = {n: tuple(line["cost"][n]) for n in ("entered", "kept")}
            cost = Cost(**{**line.pop("cost"), **tuples})
            self.samples.setdefault((key, line["sample"]), SampleResult(cell, cost=cost, **line))
            # It was tried again since.
            self.failures.pop(key, None)
        elif kind == "failure":
            self.failures[key] = Failure(cell, **line)
        else:
            tuples = {n: tuple(line[n]) for n in ("tokens", "kept")}
            self.traces[key] = Trace(cell, **{**line, **tuples})


@contextmanager
def opened(folder: Path) -> Iterator[Ledger]:
    """The results file of a folder, which is made if need be; nobody else has it meanwhile.

    Raises:
        KVPruneError: the folder cannot be written, another process works in it, or what is there
            is no results file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise KVPruneError(
            f"{folder}: another `kvprune compare` writes there: expected one at a time. Wait for "
            f"it, or name another folder with --out"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise KVPruneError(
            f"{folder}: expected a folder that can be written: {error}. Name another with --out"
        ) from error
    try:
        path = folder / NAME
        yield _parsed(path) if path.exists() else Ledger(path)
    finally:
        lock.release()


def read(folder: Path) -> Results:
    """What a folder's results file says, also while it is being written.

    Raises:
        KVPruneError: there is none, or it is damaged.
    """
    if not (folder / NAME).is_file():
        raise KVPruneError(f"{folder}: expected a folder of `kvprune compare`, found no {NAME}")
    return _parsed(folder / NAME).results


def _parsed(path: Path) -> Ledger:
    """What its whole lines say."""
    ledger = Ledger(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KVPruneError(f"{path}: expected a file that can be read: {error}") from error
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines) and (_BEGIN.startswith(line) or line.startswith(_BEGIN)):
            # It has no end: it was being written.
            break
        try:
            found = json.loads(line)
            if (number == 1) != (found["kind"] == "run"):
                raise KeyError("kind")
            ledger._take(found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KVPruneError(
                f"{path}: line {number}: expected what `kvprune compare` writes ({error!r}): "
                f"the file is damaged, or not one of these. Name another folder with --out"
            ) from error
        ledger.size += len(line) + 1
    return ledger


def _all_of(file: Any, data: bytes) -> None:
    """Writes all of it, where one call may write less, as a full disk makes it."""
    while data:
        data = data[file.write(data) :]
