"""The interface of an executor, and the simplest one: this process runs cell after cell.

Executors only yield outcomes. Their caller alone writes results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...errors import from_ctrl_c
from ..ledger.ledger import Outcome
from .worker import Job, Worker, failed


@dataclass(frozen=True)
class Source:
    """The arguments with which a worker elsewhere loads the model; see `data/loading.py`."""

    model: str
    dtype: str
    device: str


Executor = Callable[[Sequence[Job], Worker, Source], Iterator[Outcome]]
"""Yields the outcomes of the jobs, in any order.

A job that fails yields one failure, as its last outcome.
"""


def in_process(jobs: Sequence[Job], worker: Worker, source: Source) -> Iterator[Outcome]:
    """Runs one job after the other in this process."""
    for job in jobs:
        yield from attempted(job, worker)


def attempted(job: Job, worker: Worker) -> Iterator[Outcome]:
    """The outcomes of a job; the last one is a failure if an error ends the job."""
    try:
        yield from worker.run(job)
    # A policy or a task may raise any error, which must not stop the other cells.
    except Exception as error:
        if from_ctrl_c(error):
            raise KeyboardInterrupt from error
        yield failed(job.cell, error)
