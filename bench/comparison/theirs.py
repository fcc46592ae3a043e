"""kvpress's side: the likelihood of the answers to the shared task's questions, press by press.

kvpress reads a prompt as kvprune does: all tokens but the last at once, and these are evicted from.
But a press evicts once, and tokens that are read afterwards stay.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench.peers import jobs
from bench.peers.jobs import Job
from bench.peers.process import run_job
from bench.peers.protocol import Question
from bench.peers.rows import DENSE, THEIRS
from kvprune.evaluation.compare.plan import Plan
from kvprune.files import write_text

from .settings import PRESSES, SHARED

QUESTIONS_A_JOB = 10


def questions(model: Path, context: int, samples: int) -> list[Question]:
    """The samples of the shared task, as `compare` draws them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    drawn = Plan([], [SHARED], [context], [], samples, 0).drawn(tokenizer)[SHARED, context]
    return [
        Question(
            s.number,
            list(s.prompt),
            len(s.prompt),
            tokenizer.encode(f" {s.answers[0]}", add_special_tokens=False),
        )
        for s in drawn
    ]


def plan(samples: int, threads: int, presses: Sequence[str]) -> list[Job]:
    """Jobs of blocks of questions, every press at its shares; dense goes with the first ones."""
    shares: dict[tuple[float, ...], list[str]] = {}
    for press in presses:
        shares.setdefault(tuple(PRESSES[press]), []).append(press)
    rows = [(tuple(presses), given) for given, presses in shares.items()]
    rows[0] = ((DENSE, *rows[0][0]), rows[0][1])
    blocks = [
        tuple(range(i, min(i + QUESTIONS_A_JOB, samples)))
        for i in range(0, samples, QUESTIONS_A_JOB)
    ]
    return [
        Job(THEIRS, "quality", some, threads, asked="inside", shares=given, numbers=block)
        for some, given in rows
        for block in blocks
    ]


def prompts_at(out: Path, context: int) -> dict[str, Any]:
    """The prompts at a context, in the form that a worker of `bench.peers` reads."""
    found: dict[str, Any] = json.loads(_prompts(out, context).read_text(encoding="utf-8"))
    return found


def _prompts(out: Path, context: int) -> Path:
    return out / f"prompts-{context}.json"


def results(out: Path) -> Path:
    """The file of kvpress's results."""
    return out / "kvpress.jsonl"


def measure(asked: Namespace, model: Path, python: Path, out: Path, context: int) -> None:
    """Runs the jobs whose results are not there yet.

    Raises:
        KVPruneError: a process failed.
    """
    asked_for = questions(model, context, asked.samples)
    prompts = {"text": [], "questions": [asdict(question) for question in asked_for]}
    write_text(_prompts(out, context), json.dumps(prompts))
    todo = plan(asked.samples, asked.threads, asked.presses)
    for number, job in enumerate(todo, 1):
        found = jobs.read(results(out))
        if all(jobs.name(key) in found for key in job.keys(prompts)):
            continue
        print(f"kvpress {context}: {number}/{len(todo)}, {', '.join(job.rows)}", flush=True)
        run_job(job, python, [str(p) for p in (model, _prompts(out, context), results(out))])
