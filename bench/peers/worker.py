"""Runs one job, in the environment of the job's side; started by the driver.

python -m bench.peers.worker JOB MODEL PROMPTS OUT

* JOB: the job as JSON, see `Job`.
* MODEL: a folder with the model.
* PROMPTS: a JSON file of token ids.
* OUT: the file of results, which gets the results and what they were found with.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import jobs
from .jobs import Job
from .protocol import STEPS, WARM_UP_STEPS, Question, Side, answer_loss, memory, turn
from .rows import OURS


def loaded(job: Job, model: Path) -> Side:
    """The job's side with the model; imports the side's library."""
    if job.side == OURS:
        from .ours import Ours

        return Ours(model, random_heads=job.task != "quality")
    from .theirs import Theirs

    return Theirs(model)


def about(side: str) -> dict[str, Any]:
    """The versions and the machine that a side is measured with."""
    versions = {package: version(package) for package in ("torch", "transformers", side)}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **versions, "machine": machine}


def work(side: Side, job: Job, prompts: dict[str, Any], out: Path) -> None:
    """Measures what the job names; questions that have a result are left out."""
    keys = job.keys(prompts)
    if job.task == "quality":
        done = jobs.read(out)
        for key in (key for key in keys if jobs.name(key) not in done):
            question = Question(**prompts["questions"][key["number"]])
            found = answer_loss(side, key["row"], question, key["asked"], key["share"])
            jobs.append(out, [(key, found)])
        return
    steps = WARM_UP_STEPS + STEPS if job.timed else 0
    ids = torch.tensor([prompts["text"][: job.length + steps]])
    if job.timed:
        times = turn(side, job.rows, ids, job.budget)
        jobs.append(out, [(key, times[key["row"]]) for key in keys])
    else:
        jobs.append(out, [(key, memory(side, key["row"], ids, job.budget)) for key in keys])


def main() -> None:
    """Runs the job of the command line; see the module."""
    given, model, prompts, out = sys.argv[1:]
    job = Job.of(given)
    torch.set_num_threads(job.threads)
    side = loaded(job, Path(model))
    jobs.append(Path(out), [({"side": job.side, "task": "about"}, about(job.side))])
    work(side, job, json.loads(Path(prompts).read_text()), Path(out))


if __name__ == "__main__":
    main()
