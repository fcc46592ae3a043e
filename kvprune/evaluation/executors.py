"""Who runs the cells: this process, one by one or several on one reading of each prompt, or a Ray
cluster. Only the caller ever writes results."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvprune.errors import KVPruneError

from .ledger import Outcome
from .worker import Job, Worker, failed

NAMES = ("local", "shared", "ray")


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


def executor(name: str, loaded: bool) -> Executor:
    """The executor of a name.

    Args:
        name: one of `NAMES`.
        loaded: whether the model is an object, which no other process can load.

    Raises:
        KVPruneError: no such executor, not installed, or not for a loaded model.
    """
    if name not in NAMES:
        raise KVPruneError(f"--executor {name!r}: expected one of {', '.join(NAMES)}")
    if name == "local":
        return in_process
    if name == "shared":
        from .sharing import shared

        return shared
    if loaded:
        raise KVPruneError(
            f"executor={name!r} with a loaded model: expected its name or folder, which every "
            f"worker loads by itself"
        )
    if importlib.util.find_spec("ray") is None:
        raise KVPruneError(
            "--executor ray: expected the package ray; mend it with: pip install kvprune[ray]"
        )
    from .on_ray import on_ray

    return on_ray
