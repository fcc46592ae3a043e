"""The progress of a comparison, or of another command, on stderr."""

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
    """A progress bar that counts samples; without a bar it does nothing.

    Where there is no terminal, as in a file, a line is printed for each tenth of the samples.
    """

    progress: Progress | None = None
    bar: TaskID | None = None
    total: int = 0
    done: int = 0

    @classmethod
    @contextmanager
    def shown(cls, jobs: Sequence[Job], wanted: bool) -> Iterator[Watch]:
        """Shows a bar for the samples of these jobs while the context is open.

        Args:
            jobs: the jobs whose samples are counted.
            wanted: whether there is to be a bar.
        """
        if not wanted or not jobs:
            yield cls()
            return
        # Without markup, because a path or a spec may hold brackets.
        said = TextColumn("{task.description}", markup=False)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), said)
        with Progress(*columns, console=_stderr()) as progress:
            total = sum(len(job.samples) for job in jobs)
            yield cls(progress, progress.add_task(described(jobs[0].cell), total=total), total)

    def came(self, outcome: Outcome) -> None:
        """Counts an outcome that was yielded; a failure is printed at once."""
        if self.progress is None or self.bar is None:
            return
        if isinstance(outcome, Failure):
            said = f"failed: {described(outcome.cell)}: {outcome.error}"
            self.progress.console.print(said, markup=False, highlight=False, style="red")
        if isinstance(outcome, SampleResult):
            said = described(outcome.cell)
            self.progress.update(self.bar, advance=1, description=said)
            self.done += 1
            before, now = (10 * n // self.total for n in (self.done - 1, self.done))
            if now > before and not self.progress.console.is_terminal:
                line = f"{self.done} of {self.total} samples: {said}"
                self.progress.console.print(line, markup=False, highlight=False)


@contextmanager
def stage(what: str, wanted: bool = True) -> Iterator[None]:
    """Shows on stderr the work that is done, and for how long, while the context is open.

    For work whose remaining time nobody knows. In a terminal the line vanishes at the end;
    elsewhere, for example in a file, one line stays.

    Args:
        what: the work, in words.
        wanted: whether to show anything.
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
