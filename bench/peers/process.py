"""Runs one job as a process of its side's environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from kvprune.errors import KVPruneError

from .environment import ROOT
from .jobs import Job


def run_job(job: Job, python: Path, files: list[str]) -> None:
    """Runs it to its end.

    Args:
        job: what to measure.
        python: of the environment.
        files: the model's folder, the prompts and the results; see `worker`.

    Raises:
        KVPruneError: it failed.
    """
    # No registry is asked for models, and nothing of this process's Python gets into the other.
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
