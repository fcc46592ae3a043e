"""The demo: one long document, questions about it, and each configuration's costs and answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import kvprune

from ..errors import KVPruneError
from ..files import check_file, write_text
from ..models.structure import base_of, unwrapped
from ..policies import SDTP, AdaKV, Saliency, SnapKV
from .compare.worker import texts_of
from .data.assets import DEMO_ARTICLE, DEMO_QUESTIONS, Document, article_questions, demo_model
from .data.loading import loaded
from .explain import Explanation, as_page, as_terminal, explained, has_colour
from .measure.reading import longest_of
from .tasks.prompts import Ask
from .tasks.scoring import stands_in

DOCUMENT_TOKENS = 2000
NEW_TOKENS = 24
PLAIN_WIDTH = 140
ASK = "\n\nQuestion: {question}\nAnswer in a few words, with words of the text."
LEAD = "Answer:"


@dataclass(frozen=True)
class Configuration:
    """A row of the table: the name, and what its cache is made with; None for the stock cache."""

    name: str
    policies: tuple[kvprune.TokenPolicy, ...] | None = None
    store: kvprune.Quantized | None = None

    def cache(self, model: Any) -> Any:
        """A new cache for the model."""
        if self.policies is None:
            return DynamicCache(config=model.config)
        return kvprune.ComposedCache(list(self.policies), store=self.store)


QUARTER = (SDTP(), Saliency(0.25))
WITH_HEADS = (
    Configuration("dense"),
    Configuration("SDTP", (SDTP(),)),
    Configuration("Saliency 25 %", (Saliency(0.25),)),
    Configuration("SDTP + Saliency 25 %", QUARTER),
    Configuration("SDTP + Saliency 25 %, quantized", QUARTER, kvprune.Quantized()),
    Configuration("SDTP + Saliency 12.5 %", (SDTP(), Saliency(0.125))),
    Configuration("SnapKV 25 %", (SnapKV(0.25),)),
)
BY_HEAD = (AdaKV(SnapKV(0.25)),)
WITHOUT_HEADS = (
    Configuration("dense"),
    Configuration("SnapKV 25 %", (SnapKV(0.25),)),
    Configuration("AdaKV(SnapKV) 25 %", BY_HEAD),
    Configuration("AdaKV(SnapKV) 25 %, quantized", BY_HEAD, kvprune.Quantized()),
    Configuration("AdaKV(SnapKV) 12.5 %", (AdaKV(SnapKV(0.125)),)),
)
"""For models for which no heads ship."""


@dataclass(frozen=True)
class Outcome:
    """The costs and the answers of a configuration; costs are means over the questions.

    Attributes:
        name: as the table has it.
        prefill: seconds until the first new token.
        decode: new tokens per second after the first ones; None if there were none.
        held: the bytes of the cache at the end.
        as_bfloat16: the same, but two bytes for each number of keys and values that no store holds.
        answers: what was generated for each question, on one line.
        right: for each question, whether the answer that is expected stands in it.
        kept: what the cache held of the first prompt; None for the stock cache.
    """

    name: str
    prefill: float
    decode: float | None
    held: float
    as_bfloat16: float
    answers: tuple[str, ...]
    right: tuple[bool, ...]
    kept: Explanation | None


class _Clock(StoppingCriteria):
    """Notes the time of each new token; never stops a generation."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass
class _Demo:
    """A model, prompts `[1, n]`, and the answers that are expected; None where nobody knows them.

    The dense model's answers are then the ones that the others are measured by.
    """

    model: Any
    tokenizer: Any
    prompts: Sequence[torch.Tensor]
    expected: tuple[str, ...] | None

    def run(self, row: Configuration) -> Outcome:
        """Asks each question once, with a cache of its own."""
        clocks, answers = list[list[float]](), list[str]()
        held, as_bfloat16, kept = list[float](), list[float](), None
        for ids in self.prompts:
            cache, clock = row.cache(self.model), _Clock()
            tokens = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                cache=cache,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
            clocks.append(clock.times)
            text = self.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
            answers.append(" ".join(text.split()))
            numbers, size = _numbers(cache), self.model.dtype.itemsize
            held.append(numbers * size if row.policies is None else cache.nbytes)
            as_bfloat16.append(held[-1] - (numbers * (size - 2) if row.store is None else 0))
            if row.policies is not None and kept is None:
                kept = explained(cache, texts_of(self.tokenizer, ids[0].tolist()))
        self.expected = self.expected or tuple(answers)
        # The first time is the start of prefill, and the second one its end.
        steps = [b - a for each in clocks for a, b in pairwise(each[1:])]
        return Outcome(
            row.name,
            fmean(each[1] - each[0] for each in clocks),
            len(steps) / sum(steps) if steps else None,
            fmean(held),
            fmean(as_bfloat16),
            tuple(answers),
            tuple(map(stands_in, self.expected, answers)),
            kept,
        )


def _numbers(cache: Any) -> int:
    """The numbers of all keys and values that a cache holds."""
    if not isinstance(cache, kvprune.ComposedCache):
        states = ((getattr(x, "keys", None), getattr(x, "values", None)) for x in cache.layers)
        # Layers that keep a state have none.
        return sum(k.numel() + v.numel() for k, v in states if k is not None and v is not None)
    found = 0
    for index, layer in cache.slot_layers():
        columns, keys, values = cache.columns(index), layer.keys, layer.values
        # Columns that all heads share count once for each head.
        slots = int((columns >= 0).sum()) * keys.shape[1] // columns.shape[1]
        found += slots * (keys.shape[-1] + values.shape[-1])
    return found


def run_demo(
    console: Console | None = None,
    *,
    model: str | None = None,
    text: str | None = None,
    ask: Sequence[str] = (),
    html: Path | None = None,
) -> list[Outcome]:
    """Asks questions about one long document, with each configuration: one table.

    The first run fetches and converts the model (see `demo_model` in `data/assets.py`).

    Args:
        console: the console to print on; None for stdout.
        model: name or folder of a model; None for the demo model.
        text: a document of the user's own; None for an article of SQuAD.
        ask: questions about it; empty for those of the article.
        html: a file for a page that shows what of the document is kept.

    Returns:
        the outcomes in the order of the table, dense first.

    Raises:
        KVPruneError: a text without questions, or longer than the model was made for; or the model
            or the article cannot be fetched.
    """
    if text is not None and not ask:
        raise KVPruneError("demo: expected a question about the text, got none: add --ask")
    if not all(question.strip() for question in ask):
        raise KVPruneError(
            f"demo: expected questions with words, got {list(ask)!r}: leave out the empty ones"
        )
    if html is not None:
        check_file(html)
    if console is None:
        console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    torch.set_num_threads(min(torch.get_num_threads(), 2))

    def report(line: str) -> None:
        console.print(f"[dim]{line}[/dim]")

    tokenizer, stock = loaded(str(demo_model(report)) if model is None else model)
    attached: Any = kvprune.attach(stock)
    if text is None:
        document = article_questions(
            DEMO_ARTICLE, DEMO_QUESTIONS, tokenizer, DOCUMENT_TOKENS, report
        )
        title = f"“{document.title}” (SQuAD)"
    else:
        document, title = Document("", text, ()), "your text"
    questions = list(ask) or [question for question, _ in document.questions]
    expected = None if ask else tuple(answer for _, answer in document.questions)
    prompts = [_prompt(attached, tokenizer, document.text, question) for question in questions]
    console.print(Text(f"{prompts[0].shape[1]:,} tokens of {title}, and questions about it:"))
    for number, question in enumerate(questions):
        wanted = "" if expected is None else f" Expected: {expected[number]}."
        console.print(Text(f"  {number + 1}. {question}{wanted}"))
    rows, refused = _possible(attached, WITH_HEADS)
    if refused:
        console.print(Text(f"Not with learned heads: {refused[0]}", style="dim"))
        rows, refused = _possible(attached, WITHOUT_HEADS)
        for reason in refused:
            console.print(Text(f"Left out: {reason}", style="dim"))
    demo, outcomes = _Demo(attached, tokenizer, prompts, expected), list[Outcome]()
    with Live(_table([], expected is None, ""), console=console) as live:
        # This run is not timed: the first run of a process is slower.
        attached.generate(prompts[0][:, :256], max_new_tokens=2, do_sample=False)
        for row in rows:
            live.update(_table(outcomes, expected is None, f"running: {row.name}"))
            outcomes.append(demo.run(row))
            # Elsewhere the table comes at the end, when it is whole.
            if not console.is_terminal:
                console.print(Text(f"{row.name}: done, {len(outcomes)} of {len(rows)}"))
        live.update(_table(outcomes, expected is None, ""))
    if len(outcomes) == 1:
        if html is not None:
            console.print(Text(f"No page {html}: nothing was left out of the cache.", style="dim"))
        return outcomes
    best = min(outcomes[1:], key=lambda o: (-sum(o.right), o.as_bfloat16))
    assert best.kept is not None
    console.print(Text(f"\nWhat {best.name} keeps of the first prompt:\n", style="bold"))
    console.print(as_terminal(best.kept, has_colour(console)))
    if html is not None:
        write_text(html, as_page(best.kept))
        console.print(Text(f"The same as a page: {html}"))
    console.print(Text("\n" + _in_words(outcomes[0], best, expected is None), style="bold"))
    return outcomes


def _possible(model: Any, rows: Sequence[Configuration]) -> tuple[list[Configuration], list[str]]:
    """The rows that an attached model can have, and why it cannot have the others."""
    base: Any = base_of(unwrapped(model))
    found, refused = list[Configuration](), list[str]()
    for row in rows:
        try:
            if row.policies is not None:
                row.cache(model).bind(base._kvprune, base)
            found.append(row)
        except KVPruneError as error:
            refused.append(f"{row.name}: {error}")
    return found, refused


def _prompt(model: Any, tokenizer: Any, text: str, question: str) -> torch.Tensor:
    ids = Ask("", ASK.format(question=question), LEAD).ids(tokenizer, text)
    longest = longest_of(model)
    if longest and len(ids) + NEW_TOKENS > longest:
        raise KVPruneError(
            f"demo: expected a text and a question of at most the {longest - NEW_TOKENS} tokens "
            f"that leave room for an answer, got {len(ids)}. Give a part of the text"
        )
    return torch.tensor([ids], device=model.device)


def _table(outcomes: Sequence[Outcome], by_dense: bool, running: str) -> Table:
    table = Table(show_lines=True, caption=running or None)
    right = "as dense" if by_dense else "right"
    headers = ("policies", "prefill s", "decode tokens/s", "KV MB", "of bf16 dense", right)
    for header in headers:
        table.add_column(header, justify="left" if header == "policies" else "right")
    table.add_column("answers", ratio=1)
    for o in outcomes:
        answers = Text("\n").join(
            Text(f"{number}. {answer}", style="" if right else "dim red")
            for number, (answer, right) in enumerate(zip(o.answers, o.right, strict=True), 1)
        )
        table.add_row(
            Text(o.name),
            f"{o.prefill:.2f}",
            "-" if o.decode is None else f"{o.decode:.1f}",
            f"{o.held / 1e6:.1f}",
            f"{o.as_bfloat16 / outcomes[0].as_bfloat16:.1%}",
            f"{sum(o.right)} of {len(o.right)}",
            answers,
        )
    return table


def _in_words(dense: Outcome, best: Outcome, by_dense: bool) -> str:
    """What the configuration gains and loses that answers most, in the fewest bytes."""
    answers = f"{sum(best.right)} of {len(best.right)} answers are "
    answers += "those of the dense model" if by_dense else f"right (dense: {sum(dense.right)})"
    return (
        f"{best.name}: prompts are read in {best.prefill / dense.prefill:.2f} of the dense "
        f"model's time, keys and values take {best.as_bfloat16 / dense.as_bfloat16:.1%} of its "
        f"bytes in bfloat16, and {answers}."
    )
