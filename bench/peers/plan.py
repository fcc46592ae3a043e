"""The jobs of a run in their order, and how long they will take."""

from __future__ import annotations

from argparse import Namespace

from .jobs import Job
from .protocol import STEPS, WARM_UP_STEPS
from .rows import FIELD, QUALITY, SPEED

QUESTIONS_A_JOB = 10


def plan(options: Namespace) -> list[Job]:
    """The jobs; turns of the two sides alternate, so that a machine that drifts does so for both.

    Args:
        options: the options of the command line.
    """
    jobs: list[Job] = []
    if "speed" in options.tasks:
        for length in options.lengths:
            jobs += _turns(options, "speed", SPEED, length)
            every = ((side, row) for side in SPEED for row in _left(options, SPEED[side]))
            jobs += [_job(options, side, "memory", (row,), length) for side, row in every]
    if "field" in options.tasks:
        jobs += _turns(options, "field", FIELD, max(options.lengths))
    return jobs + (_quality(options) if "quality" in options.tasks else [])


def _job(
    options: Namespace, side: str, task: str, rows: tuple[str, ...], length: int, turn: int = 0
) -> Job:
    budget = int(options.keep * length)
    return Job(side, task, rows, options.threads, length=length, budget=budget, turn=turn)


def _turns(
    options: Namespace, task: str, rows: dict[str, tuple[str, ...]], length: int
) -> list[Job]:
    return [
        _job(options, side, task, _left(options, rows[side]), length, turn)
        for turn in range(options.repeats)
        for side in rows
    ]


def _quality(options: Namespace) -> list[Job]:
    numbers = range(options.questions)
    blocks = [
        tuple(numbers[i : i + QUESTIONS_A_JOB])
        for i in range(0, options.questions, QUESTIONS_A_JOB)
    ]
    return [
        Job(
            side,
            "quality",
            _left(options, QUALITY[side]),
            options.threads,
            asked=where,
            shares=tuple(options.shares),
            numbers=block,
        )
        for where in options.asked
        for block in blocks
        for side in QUALITY
    ]


def _left(options: Namespace, rows: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(row for row in rows if row not in options.leave_out)


LOADING = 10.0
QUESTION_LENGTH = 1200


def seconds_of(job: Job) -> float:
    """An estimate of a job's seconds, from what SmolLM2-135M took on two cores (see `_prefill`)."""
    if job.task == "quality":
        runs = len(job.numbers) * len(job.shares) * len(job.rows)
        return LOADING + runs * _prefill("", QUESTION_LENGTH)
    steps = (WARM_UP_STEPS + STEPS) * (0.05 + 1e-5 * job.length) if job.timed else 0
    return LOADING + sum(_prefill(row, job.length) + steps for row in job.rows)


def _prefill(row: str, length: int) -> float:
    # Measured: 1.1 s at 512 tokens, 2 s at 1k, 11 s at 4k, 33 s at 8k; eager 4.5 times as much.
    return (4.5 if row == "ObservedAttention" else 1.0) * (1.65e-3 + 2.9e-7 * length) * length
