"""The results file: JSON lines, each written whole and for good, so that a run can stop anywhere.

The kinds of lines:

    "run"      the first line: the settings of the run
    "command"  a command that was run on the same file later
    "task"     the unit and the floor of a task
    "policy"   the digests of a policy
    "sample", "failure", "trace": the dataclasses of `results.py`

Digests keep results of other data, weights or code from being taken for these. A sample's `item` is
the digest of its question. A policy's `modules` are the digests of its learned modules. Its `code`
are the digests of the files that define it; kvprune's own policies have none.
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

from ...errors import KVPruneError
from .fields import CELL, COST, OUTCOMES, checked
from .results import Cell, Cost, Failure, Results, SampleResult, Trace

NAME = "results.jsonl"
LOCK = ".results.lock"
IDENTITY = ("format", "digest", "seed", "dtype", "device", "versions")
"""The settings that all results of one file have in common."""
FORMAT = 3
"""The version of the file's format.

Since 3, a share counts the prompt without its last token, and the bytes of a policy that evicts at
a prompt's end are counted after it has evicted.
"""
_BEGIN = b'{"kind": "'

Outcome = SampleResult | Failure | Trace
Key = tuple[str, float | None, str, int]


def key_of(cell: Cell) -> Key:
    """The key of a cell, the same however its policies were spelled."""
    return cell.policy, cell.budget, cell.task, cell.context


@dataclass
class Ledger:
    """A results file and its contents; made by `opened`, which keeps other processes out.

    Attributes:
        path: the file.
        run: the first line; empty in a new file.
        commands: all commands that were run on the file.
        units: the unit of each task's score.
        floors: the floor of each task that has one.
        modules: the digests of each policy's learned modules.
        code: the digests of the files that define each policy.
        items: the digest of each sample's questions, by task, context and number.
        cells: the cells, with policies as they were first spelled.
        samples: the results of the samples, by cell and number.
        failures: the failure of each cell that could not be run.
        traces: the trace of each cell that has one.
        size: the bytes of all whole lines. The next write drops what a killed or failed write left
            behind them.
    """

    path: Path
    run: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    items: dict[tuple[str, int, int], str] = field(default_factory=dict)
    cells: dict[Key, Cell] = field(default_factory=dict)
    samples: dict[tuple[Key, int], SampleResult] = field(default_factory=dict)
    failures: dict[Key, Failure] = field(default_factory=dict)
    traces: dict[Key, Trace] = field(default_factory=dict)
    size: int = 0

    @property
    def results(self) -> Results:
        """All results in the file."""
        return Results(
            {**self.run, "command": " && ".join(self.commands)} if self.run else {},
            dict(self.units),
            tuple(self.samples.values()),
            tuple(self.failures.values()),
            tuple(self.traces.values()),
            dict(self.floors),
        )

    def check(self, run: Mapping[str, Any]) -> None:
        """Refuses to go on with the file of another run.

        Raises:
            KVPruneError: the settings of the file's run differ; the message says which.
        """
        if not self.run:
            return
        differ = [name for name in IDENTITY if self.run.get(name) != run.get(name)]
        if differ:
            got = "; ".join(f"{n} {self.run.get(n)!r}, not {run.get(n)!r}" for n in differ)
            raise KVPruneError(
                f"{self.path}: expected results of this run, and these are of another: {got} "
                f"(its model is {self.run.get('model')!r}). Name another folder with --out"
            )

    def check_item(self, task: str, context: int, number: int, digest: str) -> None:
        """Refuses results of other data.

        Raises:
            KVPruneError: the file's sample of this number has another digest.
        """
        if self.items.get((task, context, number), digest) != digest:
            raise KVPruneError(
                f"{self.path}: expected results of the same samples, and number {number} of "
                f"{task} at {context} tokens was another: the task's data, its code, the "
                f"tokenizer or --questions has changed. Name another folder with --out"
            )

    def check_task(self, name: str, unit: str, floor: float | None) -> None:
        """Refuses results that were scored in another way.

        Raises:
            KVPruneError: the task had another unit, or another floor.
        """
        before, now = (self.units.get(name), self.floors.get(name)), (unit, floor)
        if name in self.units and before != now:
            raise KVPruneError(
                f"{self.path}: expected results of {name} that are scored as before, by "
                f"{before[0]} with a floor of {before[1]}, got {unit} with a floor of {floor}: "
                f"the task has changed. Name another folder with --out"
            )

    def check_policy(self, policy: str, modules: str, code: str) -> None:
        """Refuses results of other learned modules, or of other code.

        Raises:
            KVPruneError: the file has other digests for this policy.
        """
        if self.modules.get(policy, modules) != modules:
            raise KVPruneError(
                f"{self.path}: expected results of the same weights, and those of {policy} have "
                f"changed. Name another folder with --out"
            )
        if self.code.get(policy, code) != code:
            raise KVPruneError(
                f"{self.path}: expected results of the same code, and the file that {policy} "
                f"stands in has changed. Name another folder with --out, or delete this file"
            )

    def begin(self, run: Mapping[str, Any]) -> None:
        """Writes the run if the file is new, else its command if the file does not have it."""
        if not self.run:
            self._write("run", run)
        elif run["command"] not in self.commands:
            self._write("command", {"command": run["command"], "date": run["date"]})

    def note_task(self, name: str, unit: str, floor: float | None) -> None:
        """Writes the unit and the floor of a task, once."""
        if name not in self.units:
            self._write("task", {"name": name, "unit": unit, "floor": floor})

    def note_policy(self, policy: str, modules: str, code: str) -> None:
        """Writes the digests of a policy's modules and code, once, and only if there are any."""
        if (modules or code) and policy not in self.modules:
            self._write("policy", {"policy": policy, "modules": modules, "code": code})

    def add(self, outcome: Outcome, item: str = "") -> None:
        """Writes an outcome.

        Args:
            outcome: a sample, a failure or a trace.
            item: the digest of the question, for a sample.
        """
        if isinstance(outcome, SampleResult):
            self._write("sample", {"item": item, **asdict(outcome)})
        else:
            self._write("failure" if isinstance(outcome, Failure) else "trace", asdict(outcome))

    def done(self, cell: Cell) -> set[int]:
        """The numbers of a cell's samples that are in the file."""
        key = key_of(cell)
        return {number for other, number in self.samples if other == key}

    def _write(self, kind: str, content: Mapping[str, Any]) -> None:
        """Appends a line, which is on the disk when this method returns."""
        line = json.dumps({"kind": kind, **content}) + "\n"
        try:
            self._check_whole()
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

    def _check_whole(self) -> None:
        """Refuses to write if lines that were written are gone."""
        there = self.path.stat().st_size if self.path.exists() else 0
        if there < self.size:
            raise KVPruneError(
                f"{self.path}: expected the {self.size} bytes that were written, found {there}: it "
                f"was deleted or cut meanwhile. Leave it alone while it is written, and start again"
            )

    def _take(self, line: dict[str, Any]) -> None:
        """Takes the content of one line into the ledger."""
        kind = line.pop("kind")
        if kind == "run":
            if line["format"] != FORMAT:
                raise KVPruneError(
                    f"{self.path}: expected results of format {FORMAT}, got "
                    f"{line['format']!r}: another version of kvprune wrote them. Read them with "
                    f"that one, or name another folder"
                )
            self.run, self.commands = line, [line["command"]]
        elif kind == "command":
            self.commands.append(line["command"])
        elif kind == "task":
            self.units[line["name"]] = line["unit"]
            self.floors |= {} if line["floor"] is None else {line["name"]: line["floor"]}
        elif kind == "policy":
            self.modules[line["policy"]] = line["modules"]
            self.code[line["policy"]] = line["code"]
        else:
            cell = Cell(**checked(line.pop("cell"), CELL))
            self._take_outcome(kind, line, self.cells.setdefault(key_of(cell), cell))

    def _take_outcome(self, kind: str, line: dict[str, Any], cell: Cell) -> None:
        """Takes a sample, a failure or a trace into the ledger."""
        key = key_of(cell)
        checked(line, OUTCOMES[kind])
        if kind == "sample":
            # Older versions did not note what was held.
            cost = self._cost(checked({"held": [], **line.pop("cost")}, COST))
            self.items[cell.task, cell.context, line["sample"]] = line.pop("item")
            self.samples.setdefault((key, line["sample"]), SampleResult(cell, cost=cost, **line))
            # The failed cell was run again after its failure.
            self.failures.pop(key, None)
        elif kind == "failure":
            self.failures[key] = Failure(cell, **line)
        else:
            tuples = {n: tuple(line[n]) for n in ("tokens", "kept")}
            self.traces[key] = Trace(cell, **{**line, **tuples})

    def _cost(self, given: Mapping[str, Any]) -> Cost:
        """The cost of a sample.

        Raises:
            ValueError: the cost has another number of layers than those of the other samples.
        """
        tuples = {n: tuple(given[n]) for n in ("entered", "kept", "held")}
        cost = Cost(**{**given, **tuples})
        first = next((r.cost for r in self.samples.values()), cost)
        for name, layers in tuples.items():
            known = first.kept if name == "held" else getattr(first, name)
            if len(layers) != len(known) and (layers or name != "held"):
                raise ValueError(f"{name!r} has {len(layers)} layers")
        return cost


@contextmanager
def opened(folder: Path) -> Iterator[Ledger]:
    """The results file of a folder; no other process can open it while the context is open.

    The folder is made if it is missing.

    Raises:
        KVPruneError: the folder cannot be written, another process works in it, or the file in it
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
        # Reading a device might never end.
        if path.exists() and not path.is_file():
            raise KVPruneError(
                f"{path}: expected a file, got a folder or a device. Name another folder with --out"
            )
        yield _parsed(path) if path.exists() else Ledger(path)
    finally:
        lock.release()


def read(folder: Path) -> Results:
    """The results in a folder's file, which may still be written by another process.

    Raises:
        KVPruneError: there is no results file, or it is damaged.
    """
    if not (folder / NAME).is_file():
        raise KVPruneError(f"{folder}: expected a folder of `kvprune compare`, found no {NAME}")
    return _parsed(folder / NAME).results


def _parsed(path: Path) -> Ledger:
    """A ledger with the contents of the file's whole lines.

    Raises:
        KVPruneError: the file cannot be read, or it is damaged.
    """
    ledger = Ledger(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KVPruneError(f"{path}: expected a file that can be read: {error}") from error
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines) and (_BEGIN.startswith(line) or line.startswith(_BEGIN)):
            # The last line has no line end, so it was not written whole: it is left out.
            break
        try:
            found = json.loads(line)
            # The first line is the run, and no other line is.
            if (number == 1) != (found["kind"] == "run"):
                raise KeyError("kind")
            ledger._take(found)
        except KVPruneError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise KVPruneError(
                f"{path}: line {number}: expected what `kvprune compare` writes ({error!r}): "
                f"the file is damaged, or not one of these. Name another folder with --out"
            ) from error
        ledger.size += len(line) + 1
    return ledger


def _all_of(file: Any, data: bytes) -> None:
    """Writes all of the data, since one call may write only a part, as on a full disk."""
    while data:
        data = data[file.write(data) :]
