"""What an executor is, and the simplest one: this process runs the cells, one by one.

Only the caller ever writes results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..ledger.ledger import Outcome
from .worker import Job, Worker, failed


@dataclass(frozen=True)
class Source:
    """What a worker elsewhere loads the model from; see `loading.loaded`."""

    model: str
    dtype: str
    device: str


Executor = Callable[[Sequence[Job], Worker, Source], Iterator[Outcome]]
"""Yields what comes of the jobs, in any order; a job that fails yields one failure, the last."""


def in_process(jobs: Sequence[Job], worker: Worker, source: Source) -> Iterator[Outcome]:
    """One job after the other, here."""
    for job in jobs:
        yield from attempted(job, worker)


def attempted(job: Job, worker: Worker) -> Iterator[Outcome]:
    """What comes of a job, and the failure that ends it, if one does."""
    try:
        yield from worker.run(job)
    # A policy or a task may fail in any way, and stops no other cell.
    except Exception as error:
        yield failed(job.cell, error)
