"""How far a comparison, or another command, is, on stderr."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..ledger.ledger import Outcome
from ..ledger.results import Cell, Failure, SampleResult
from .worker import Job


@dataclass
class Watch:
    """A bar that counts samples; without one it does nothing."""

    progress: Progress | None = None
    bar: TaskID | None = None

    @classmethod
    @contextmanager
    def shown(cls, jobs: Sequence[Job], wanted: bool) -> Iterator[Watch]:
        """A bar for the samples of these jobs, while the context is open."""
        if not wanted or not jobs:
            yield cls()
            return
        # Not markup: a path or a spec may hold brackets.
        said = TextColumn("{task.description}", markup=False)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), said)
        with Progress(*columns, console=_stderr()) as progress:
            total = sum(len(job.samples) for job in jobs)
            yield cls(progress, progress.add_task(described(jobs[0].cell), total=total))

    def came(self, outcome: Outcome) -> None:
        """Takes note of what has come; a failure is said at once."""
        if self.progress is None or self.bar is None:
            return
        if isinstance(outcome, Failure):
            said = f"failed: {described(outcome.cell)}: {outcome.error}"
            self.progress.console.print(said, markup=False, highlight=False, style="red")
        if isinstance(outcome, SampleResult):
            self.progress.update(self.bar, advance=1, description=described(outcome.cell))


@contextmanager
def stage(what: str, wanted: bool = True) -> Iterator[None]:
    """Says on stderr what is being done, and for how long, while the context is open.

    For work of which nobody knows how much is left. In a terminal nothing stays behind; elsewhere,
    as in a file, it is one line.
    """
    console = _stderr()
    if not wanted:
        yield
        return
    if not console.is_terminal:
        console.print(what, markup=False, highlight=False)
        yield
        return
    said = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), said, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield


def _stderr() -> Console:
    return Console(stderr=True)


def described(cell: Cell) -> str:
    """A cell in a few words."""
    budget = "" if cell.budget is None else f" at {cell.budget:g}"
    return f"{cell.task} {cell.context}: {cell.label}{budget}"
