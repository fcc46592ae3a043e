"""Tasks for tests: tiny, and as bad as asked for."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from kvprune import KVPruneError
from kvprune.evaluation.tasks.base import Reader, Sample, Score, Task
from kvprune.policies import H2O
from kvprune.policy import Budget, Ranking, SlotView, TokenPolicy

from ..evaluation.test_explain import SIZE, bytes_tokenizer
from .models import fresh_model


@dataclass(frozen=True)
class Echo(Task):
    """What is generated behind random letters, as a number."""

    salt: str = ""

    name: ClassVar[str] = "echo"
    unit: ClassVar[str] = "letters"
    floor: ClassVar[float | None] = 0.25

    def samples(self, tokenizer: Any, context: int, count: int, seed: int) -> Sequence[Sample]:
        """Prompts of `context` tokens and less."""
        if context < 8:
            raise KVPruneError(f"echo: expected a context of at least 8 tokens, got {context}")
        found = []
        for number in range(count):
            chance = random.Random(f"{self.salt} {seed} {number}")
            text = "".join(chance.choices("abc <[d", k=context - number % 3))
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            found.append(Sample(number, ids, ids[-4:], (text[:2],)))
        return found

    def score(self, sample: Sample, reader: Reader) -> Score:
        """The sum of what comes, so that it depends on every token."""
        said = reader.generate(3)
        return Score(float(sum(map(ord, said))), {"length": len(said)}, said)


@dataclass(frozen=True)
class Likely(Echo):
    """How likely two letters are."""

    name: ClassVar[str] = "likely"
    unit: ClassVar[str] = "nats a token"
    floor: ClassVar[float | None] = None

    def score(self, sample: Sample, reader: Reader) -> Score:
        """On average."""
        found = reader.log_likelihood(sample.answers[0])
        return Score(sum(found) / len(found))


@dataclass(frozen=True)
class Killed(Echo):
    """Ends the process, as `kill -9` does, or as Ctrl-C does, while a file is not there."""

    after: int = 0
    there: str = ""
    signal: int = signal.SIGKILL

    def score(self, sample: Sample, reader: Reader) -> Score:
        """Makes the file first, so that it happens once."""
        if sample.number == self.after and not Path(self.there).exists():
            Path(self.there).touch()
            os.kill(os.getpid(), self.signal)
        return super().score(sample, reader)


FAILING = {"now": True}
"""Whether `Failing` fails."""


@dataclass(frozen=True, repr=False)
class Failing(H2O):
    """A policy with a mistake that comes up in the third sample's prompt."""

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Not where a prompt, with its last token, is a multiple of three."""
        if FAILING["now"] and (int(slots.prompt_length.max()) + 1) % 3 == 0:
            raise RuntimeError("a mistake")
        return super().rank_slots(slots)


@dataclass(frozen=True, repr=False)
class AtTheEnd(TokenPolicy):
    """Evicts where a prompt ends, and never again: the newest stay, and all that come later."""

    budget: int | float = 5

    def with_budget(self, share: float) -> AtTheEnd:
        """The share is the budget."""
        return replace(self, budget=share)

    def rank_slots(self, slots: SlotView) -> Ranking:
        """In a row whose prompt is not complete, or was so before, everything stays."""
        at_end = slots.first + slots.prompt_length == slots.seen
        budget = torch.where(at_end, Budget(self.budget).of(slots.prompt_length), slots.seen)
        return Ranking(slots.columns.double(), torch.zeros_like(slots.valid), budget)


def saved_model(folder: Path, seed: int = 0) -> Path:
    """A tiny model and its tokenizer, each byte a token."""
    model: Any = fresh_model(vocab_size=SIZE, dtype=torch.float32)
    if seed:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight += seed
    model.save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return folder
