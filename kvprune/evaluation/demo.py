"""The demo: one real prompt with a question, and the cost and the answer of each policy."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

import kvprune

from ..policies import H2O, SDTP, StreamingLLM
from .data.assets import (
    DEMO_ARTICLE,
    DEMO_LEAD,
    DEMO_QUESTION,
    Report,
    article_question,
    demo_model,
)

CONTEXT_TOKENS = 2000
NEW_TOKENS = 32
PLAIN_WIDTH = 140


@dataclass
class Outcome:
    """The cost and the answer of one run.

    Attributes:
        name: the policy, as the table names it.
        prefill: seconds until the first new token.
        decode: new tokens per second after the first one.
        megabytes: the size of the cache at the end, in 10^6 bytes.
        share: the share of all columns that a layer holds at the end, a mean over the layers.
        text: the new tokens as text, on one line.
    """

    name: str
    prefill: float
    decode: float
    megabytes: float
    share: float
    text: str


class _Clock(StoppingCriteria):
    """Notes the time of each new token; never stops a generation."""

    def __init__(self, progress: Any, task: Any) -> None:
        self.times = [time.perf_counter()]
        self._progress, self._task = progress, task

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        self._progress.advance(self._task)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass
class _Demo:
    model: Any
    tokenizer: Any
    inputs: dict[str, torch.Tensor]
    progress: Progress
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self, name: str, cache: Cache) -> None:
        """Generates once with this cache, and notes the outcome under this name."""
        task = self.progress.add_task(name, total=NEW_TOKENS)
        clock = _Clock(self.progress, task)
        tokens = self.model.generate(
            **self.inputs,
            past_key_values=cache,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        new = tokens[0, self.inputs["input_ids"].shape[1] :]
        # The first time is the start of prefill, and the second one its end.
        steps = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        rate = len(steps) / sum(steps)
        prefill = clock.times[1] - clock.times[0]
        self.outcomes.append(Outcome(name, prefill, rate, *_held(cache), " ".join(text.split())))


def _held(cache: Any) -> tuple[float, float]:
    """The megabytes of a cache, and the share of all columns that its layers hold on average."""
    if isinstance(cache, kvprune.ComposedCache):
        kept = [cache.columns(i).shape[-1] for i in range(len(cache))]
        return cache.nbytes / 1e6, sum(kept) / len(kept) / cache.seen
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 1e6, 1.0


def run_demo(console: Console | None = None) -> list[Outcome]:
    """Prints the cost and the answer of each policy on a real prompt of 2,000 tokens.

    The first run fetches and converts the model (see `demo_model` in `data/assets.py`).

    Args:
        console: the console to print on; None for stdout.

    Returns:
        the outcomes in the order of the table, dense first.

    Raises:
        KVPruneError: the model or the text cannot be fetched.
    """
    if console is None:
        console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    torch.set_num_threads(min(torch.get_num_threads(), 2))

    def report(line: str) -> None:
        console.print(f"[dim]{line}[/dim]")

    path = demo_model(report)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = kvprune.attach(AutoModelForCausalLM.from_pretrained(path))
    inputs = _prompt(tokenizer, console, report)
    with Progress(console=console, transient=True) as progress:
        demo = _Demo(model, tokenizer, inputs, progress)
        # This run is not timed: the first run of a process is slower.
        model.generate(inputs["input_ids"][:, :256], max_new_tokens=2, do_sample=False)
        demo.run("dense", DynamicCache(config=model.config))
        for name, policies in _rows():
            demo.run(name, kvprune.ComposedCache(policies))
    console.print(_table(demo.outcomes))
    return demo.outcomes


def _rows() -> list[tuple[str, list[kvprune.TokenPolicy]]]:
    h2o, streaming, sdtp = H2O(heavy=0.1, recent=0.1), StreamingLLM(sinks=4, window=0.2), SDTP()
    return [
        ("StreamingLLM 20 %", [streaming]),
        ("H2O 20 %", [h2o]),
        ("SDTP", [sdtp]),
        ("SDTP + H2O 20 %", [sdtp, h2o]),
    ]


def _prompt(tokenizer: Any, console: Console, report: Report) -> dict[str, torch.Tensor]:
    asked = article_question(DEMO_ARTICLE, DEMO_QUESTION, tokenizer, CONTEXT_TOKENS, report)
    message = [{"role": "user", "content": f"{asked.context}\n\n{asked.question}"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text + DEMO_LEAD, add_special_tokens=False, return_tensors="pt")
    console.print(
        f"[bold]{inputs['input_ids'].shape[1]} tokens[/bold] of “{asked.title}” (SQuAD), then: "
        f"[bold]{asked.question}[/bold] Expected: {asked.answer}.\n"
        f"The answer begins: {DEMO_LEAD} ..."
    )
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(show_lines=True)
    headers = ("policy", "prefill s", "decode tokens/s", "KV MB held", "share kept")
    for header in headers:
        table.add_column(header, justify="left" if header == "policy" else "right")
    table.add_column("text", ratio=1)
    for o in outcomes:
        numbers = (f"{o.prefill:.2f}", f"{o.decode:.1f}", f"{o.megabytes:.1f}", f"{o.share:.0%}")
        table.add_row(o.name, *numbers, o.text)
    return table
