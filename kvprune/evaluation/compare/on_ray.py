"""Cells as plain tasks of a Ray cluster: any worker that is free runs the next cell.

A worker loads the model once, and refuses to work with a model that is not the caller's. The
outcomes of a cell come back together when the cell is done. If a worker is killed, Ray replaces it
and runs the cell from the start, so nothing is lost or there twice. Each cell has one core, and one
GPU too unless the device is the CPU. Times are measured on the worker, beside other cells on the
same machine.
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
"""The number of times that a cell is run again after its worker was lost."""


def on_ray(jobs: Sequence[Job], worker: Worker, source: Source) -> Iterator[Outcome]:
    """Runs the jobs on the connected cluster, on that of RAY_ADDRESS, or on a local one."""
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
            # The worker was lost too often, or refused the model.
            except ray.exceptions.RayError as error:
                yield failed(job.cell, error)
    finally:
        for left in waiting:
            ray.cancel(left, force=True)
        # A cluster that was connected before stays connected.
        if mine:
            ray.shutdown()


def run_job(source: Source, digest: str, job: Job) -> list[Outcome]:
    """The work of a Ray worker: all outcomes of one job.

    Raises:
        KVPruneError: the model on this machine is not the caller's.
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
    """The worker of this process for a model, which is loaded once."""
    tokenizer, model = loaded(source.model, source.dtype, source.device)
    return Worker(attach(model), tokenizer)
