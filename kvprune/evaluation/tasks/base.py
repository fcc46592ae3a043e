"""What a task is: samples, drawn by a seed, and a score for what a model makes of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class Sample:
    """One item of a task.

    number: from 0, in the order in which they were drawn.
    prompt: token ids of everything that is read before the answer, template included.
    bare: the same without the long context: what can be guessed (the lower line).
    answers: what is to be found in the answer, or the one text that is to be likely.
    """

    number: int
    prompt: tuple[int, ...]
    bare: tuple[int, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """How well a sample went.

    value: higher is better, in the task's `unit`.
    parts: more numbers by name, such as the log-likelihood by position; may be empty.
    answer: the text that was generated, if any.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    answer: str = ""


class Reader(Protocol):
    """A model that has read a sample's prompt with one cache; can be asked once.

    What it says is told from what that cache holds once the prompt was evicted from.
    """

    def generate(self, tokens: int) -> str:
        """Up to so many greedy tokens behind the prompt, as text; ends at eos."""
        ...

    def log_likelihood(self, text: str | Sequence[int]) -> list[float]:
        """Of each token of a text behind the prompt, in nats, the text as it stands."""
        ...


class Task(ABC):
    """One thing to be good at. Subclasses are frozen dataclasses with one file each.

    name: its id on the command line. unit: of `Score.value`, such as "recall" or "nats a token".
    floor: the least mean that the dense model must reach for a comparison to mean anything; None
    where the unit has none, and dense need only be above the lower line.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    floor: ClassVar[float | None] = None

    @abstractmethod
    def samples(self, tokenizer: Any, context: int, count: int, seed: int) -> Sequence[Sample]:
        """The first `count` samples of a seed, each with a prompt of at most `context` tokens.

        Sample i does not depend on `count`.

        Raises:
            KVPruneError: a context too short for the task, or fewer samples than asked for.
        """

    def following(self, sample: Sample, tokenizer: Any) -> int:
        """The most tokens that may follow a sample's prompt, which a model must have room for."""
        return 0

    @abstractmethod
    def score(self, sample: Sample, reader: Reader) -> Score:
        """Asks the reader, once, and judges."""
