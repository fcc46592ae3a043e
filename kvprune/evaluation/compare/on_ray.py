"""Cells as plain tasks of a Ray cluster, each run by whichever worker is free.

A worker loads the model once and refuses to run one that is not the caller's. What it has of a
cell comes back when the cell is done: a worker that is killed is replaced by Ray and its cell run
from the start, so nothing is lost or there twice. Each cell has one core (or one GPU), and times
are those of its worker, beside others on the same machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

from ...errors import KVPruneError
from ...wiring.attach import attach
from ..data.loading import loaded
from ..ledger.ledger import Outcome
from .executors import Source, attempted
from .worker import Job, Worker, failed

RETRIES = 3
"""How often a cell is run again whose worker was lost."""


def on_ray(jobs: Sequence[Job], worker: Worker, source: Source) -> Iterator[Outcome]:
    """Runs the jobs on the cluster that is connected, that RAY_ADDRESS names, or a local one."""
    import ray

    mine = not ray.is_initialized()
    if mine:
        ray.init(log_to_driver=False)
    gpus = int(not source.device.startswith("cpu"))
    remote = ray.remote(max_retries=RETRIES, num_cpus=1, num_gpus=gpus)(run_job)
    waiting = {remote.remote(source, worker.digest, job): job for job in jobs}
    try:
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(ready)
            try:
                yield from ray.get(ready)
            except ray.exceptions.RayError as error:
                yield failed(job.cell, error)
    finally:
        for left in waiting:
            ray.cancel(left, force=True)
        if mine:
            ray.shutdown()


def run_job(source: Source, digest: str, job: Job) -> list[Outcome]:
    """What a worker does: all that comes of a job.

    Raises:
        KVPruneError: the model here is not the one that the others have.
    """
    worker = _worker_of(source)
    if worker.digest != digest:
        raise KVPruneError(
            f"--model {source.model}: expected the same model on every machine of the cluster, "
            f"got one with other weights or another config"
        )
    return list(attempted(job, worker))


@cache
def _worker_of(source: Source) -> Worker:
    tokenizer, model = loaded(source.model, source.dtype, source.device)
    return Worker(attach(model), tokenizer)
