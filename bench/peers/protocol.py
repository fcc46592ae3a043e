"""The lines of code that measure either side; they import neither library.

A prompt is read with a fresh cache, which then holds what the row's budget allows. The tokens that
follow the prompt, single tokens or an answer, are read on what is held, at their positions in the
text. Nothing is generated: the tokens that follow are given, so that all rows read the same.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import resident

WARM_UP_STEPS, STEPS = 10, 20
"""Single-token steps after a prompt, first those that are not timed. kvpress's decoding press
compresses in every tenth step, so once in the first and twice in the timed ones."""

WARM_UP_PROMPT = 128
"""Tokens that each row reads before anything is timed."""

Clock = Callable[[], float]


@dataclass
class Opened:
    """A model, and a fresh cache for one prompt.

    Attributes:
        model: the model.
        cache: the cache.
        reading: the context that is entered while the prompt is read.
        after: the context that is entered while the tokens behind the prompt are read.
        seen: how many tokens were read so far.
    """

    model: Any
    cache: Any
    reading: AbstractContextManager[Any] = field(default_factory=nullcontext)
    after: AbstractContextManager[Any] = field(default_factory=nullcontext)
    seen: int = 0

    def read(self, ids: Tensor, logits: int = 1) -> Tensor:
        """Reads the next tokens `[1, Q]`; returns logits `[1, logits, V]` of the last of them."""
        positions = torch.arange(self.seen, self.seen + ids.shape[1])[None]
        self.seen += ids.shape[1]
        given = {"past_key_values": self.cache, "position_ids": positions}
        said: Tensor = self.model(ids, logits_to_keep=logits, **given).logits
        return said


class Side(Protocol):
    """One library, with the model."""

    def open(self, row: str, budget: int, length: int) -> Opened:
        """Opens a prompt of `length` tokens, of which the row keeps `budget` in each layer."""

    def nbytes(self, cache: Any) -> int:
        """The bytes of all storage that a cache has."""


@dataclass(frozen=True)
class Question:
    """The token ids of a question and its answer.

    Attributes:
        number: the question's number.
        prompt: the prompt, which asks the question.
        context: how many of the prompt's first tokens are the context.
        answer: the tokens of the answer.
    """

    number: int
    prompt: list[int]
    context: int
    answer: list[int]


def seconds(work: Callable[[], Any], clock: Clock) -> float:
    """The seconds of one call."""
    start = clock()
    work()
    return clock() - start


@torch.no_grad()
def turn(
    side: Side, rows: tuple[str, ...], ids: Tensor, budget: int, clock: Clock = time.perf_counter
) -> dict[str, dict[str, Any]]:
    """Times each row, one after the other.

    Args:
        side: the side.
        rows: the rows.
        ids: `[1, prompt + all steps]`.
        budget: the tokens that a row keeps in each layer.
        clock: gives the time in seconds.

    Returns:
        a dict for each row: `prefill` in seconds; `decode` in seconds a step, the mean of
        `STEPS`; `held` and `held_after`, bytes after the prompt and after all steps.
    """
    for row in rows:
        _run(side, row, ids[:, : WARM_UP_PROMPT + 1], WARM_UP_PROMPT // 2, 1, clock)
    steps = WARM_UP_STEPS + STEPS
    return {row: _run(side, row, ids, budget, steps, clock) for row in rows}


def _run(
    side: Side, row: str, ids: Tensor, budget: int, steps: int, clock: Clock
) -> dict[str, Any]:
    prompt, following = ids[:, :-steps], ids[:, -steps:].split(1, 1)
    opened = side.open(row, budget, prompt.shape[1])
    # The garbage of an earlier row is not to be collected while this row is timed.
    gc.collect()
    with opened.reading:
        prefill = seconds(partial(opened.read, prompt), clock)
    held = side.nbytes(opened.cache)
    with opened.after:
        times = [seconds(partial(opened.read, token), clock) for token in following]
    said = {"prefill": prefill, "decode": statistics.fmean(times[-STEPS:]), "held": held}
    return said | {"held_after": side.nbytes(opened.cache)}


@torch.no_grad()
def memory(side: Side, row: str, ids: Tensor, budget: int) -> dict[str, Any]:
    """The most that this process held while a prompt `[1, n]` was read, in bytes.

    The measurement needs a process of its own, as the allocator keeps what earlier rows freed.

    Returns:
        a dict: `peak` is of the whole process, `beyond` the part of it beyond what the process
        held before. None where the system does not say (not Linux).
    """
    _run(side, row, ids[:, : WARM_UP_PROMPT + 1], WARM_UP_PROMPT // 2, 1, time.perf_counter)
    gc.collect()
    before = resident.forget_peak()
    opened = side.open(row, budget, ids.shape[1])
    with opened.reading:
        opened.read(ids)
    peak = resident.peak()
    beyond = None if peak is None or before is None else peak - before
    return {"peak": peak, "beyond": beyond}


@torch.no_grad()
def answer_loss(
    side: Side, row: str, question: Question, asked: str, share: float | None
) -> dict[str, Any]:
    """The loss of an answer after a prompt: all answer tokens are told from what the cache holds.

    Args:
        side: the side.
        row: the row.
        question: the question.
        asked: "inside": all of the prompt but its last token is read, and evicted from; "after":
            the context alone is, and the question is read on what is held, as kvpress's own
            pipeline does.
        share: the share of the tokens read that each layer keeps; None for a row without a budget.

    Returns:
        `nll`, the negative log-likelihood as a mean over the answer's tokens, and `held`, bytes.
    """
    # Presses that draw random numbers take them from the global generator.
    torch.manual_seed(question.number)
    length = {"inside": len(question.prompt) - 1, "after": question.context}[asked]
    budget = length if share is None else int(share * length)
    opened = side.open(row, budget, length)
    with opened.reading:
        opened.read(torch.tensor([question.prompt[:length]]))
    held = side.nbytes(opened.cache)
    rest = torch.tensor([question.prompt[length:] + question.answer[:-1]])
    with opened.after:
        logits = opened.read(rest, logits=rest.shape[1])[0, -len(question.answer) :]
    loss = F.cross_entropy(logits.float(), torch.tensor(question.answer))
    return {"nll": float(loss), "held": held}
