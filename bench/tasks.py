"""Measures what the dense demo model reaches on each task, for `Task.floor`.

    python -m bench.tasks

Each row also has the lower line, the same questions without their context. Ten samples at 512 and
1024 tokens take a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvprune.evaluation.data.assets import demo_model
from kvprune.evaluation.report.statistics import interval
from kvprune.evaluation.tasks import TASKS, task
from kvprune.evaluation.tasks.base import Task

from .about import write

OUT = Path(__file__).parent / "results" / "tasks.json"


@dataclass
class Dense:
    """A `Reader` with the model's own cache."""

    model: Any
    tokenizer: Any
    prompt: tuple[int, ...]

    @torch.no_grad()
    def generate(self, tokens: int) -> str:
        """See `Reader.generate`."""
        ids = torch.tensor([self.prompt])
        written = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        return str(self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))

    @torch.no_grad()
    def log_likelihood(self, text: str | Sequence[int]) -> list[float]:
        """See `Reader.log_likelihood`."""
        if isinstance(text, str):
            text = self.tokenizer.encode(text, add_special_tokens=False)
        ids = torch.tensor([[*self.prompt, *text]])
        logits = self.model(ids, logits_to_keep=len(text) + 1).logits[0, :-1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None])
        return [float(value) for value in chosen[:, 0]]


def measured(asked: Task, context: int, count: int, model: Any, tokenizer: Any) -> dict[str, Any]:
    """One row: the mean score with the context and its interval, and the mean score without."""
    samples = asked.samples(tokenizer, context, count, seed=0)
    with_it = [asked.score(s, Dense(model, tokenizer, s.prompt)).value for s in samples]
    without = [asked.score(s, Dense(model, tokenizer, s.bare)).value for s in samples]
    row = {"task": asked.name, "unit": asked.unit, "context": context, "samples": count}
    low, high = interval(with_it)
    row |= {"dense": sum(with_it) / count, "low": low, "high": high}
    return row | {"no context": sum(without) / count, "floor": asked.floor}


def main() -> None:
    """Measures the tasks, and writes JSON after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--context", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    rows = []
    for name in args.tasks:
        for context in args.context:
            rows.append(measured(task(name), context, args.samples, model, tokenizer))
            print(rows[-1], flush=True)
            write(args.out, args, model, rows)


if __name__ == "__main__":
    main()
