"""Runs one job as a process in the environment of its side."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from kvprune.errors import KVPruneError

from .environment import ROOT
from .jobs import Job


def run_job(job: Job, python: Path, files: list[str]) -> None:
    """Runs a job to its end.

    Args:
        job: the job.
        python: the Python of the job's environment.
        files: the model's folder, the prompts and the results; see `worker`.

    Raises:
        KVPruneError: the process failed.
    """
    # No registry is asked for models, and no setting of this process's Python reaches the other.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(job.threads)}
    command = [str(python), "-m", "bench.peers.worker", job.text(), *files]
    done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise KVPruneError(
            f"peers: {job.side} {job.task} {', '.join(job.rows)} failed with exit code "
            f"{done.returncode}: {said[-1] if said else 'it said nothing'}. The same command goes "
            f"on with it; --leave-out ROW goes on without a row"
        )
