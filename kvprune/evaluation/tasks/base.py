"""The interface of a task: samples, drawn by a seed, and a score for a model's answer to each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from ...errors import KVPruneError


@dataclass(frozen=True)
class Sample:
    """One item of a task.

    Attributes:
        number: the number of the sample, from 0, in the order of drawing.
        prompt: the token ids of everything that is read before the answer, template included.
        bare: the same without the long context, for the line "no context": the model can only
            guess.
        answers: the texts to be found in the answer, or the one text that is to be likely.
        context: how many of the prompt's tokens stand before the question; 0 where no question
            stands behind the context.
        behind: how many of its last tokens are read as generated tokens are, behind what policies
            take for the prompt: the last one, or a question that is not known before.
        more: further questions about the same context. The sample's score is the mean over all, so
            that intervals count contexts.
    """

    number: int
    prompt: tuple[int, ...]
    bare: tuple[int, ...]
    answers: tuple[str, ...]
    context: int = 0
    behind: int = 1
    more: tuple[Sample, ...] = ()

    @property
    def questions(self) -> tuple[Sample, ...]:
        """The sample itself, and what else is asked of its context."""
        return self, *self.more


@dataclass(frozen=True)
class Score:
    """The score of one sample.

    Attributes:
        value: the score in the task's `unit`; higher is better.
        parts: more numbers by name, such as the log-likelihood by position; may be empty.
        answer: the text that was generated, if any.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    answer: str = ""


class Reader(Protocol):
    """A model that has read a sample's prompt with one cache; it can be asked once.

    Its answer depends on what the cache holds once the prompt was evicted from.
    """

    def generate(self, tokens: int) -> str:
        """Up to `tokens` greedy tokens behind the prompt, as text; ends at eos."""
        ...

    def log_likelihood(self, text: str | Sequence[int]) -> list[float]:
        """The log-likelihood of each token of a text behind the prompt, in nats.

        The text is taken as it stands, without a space or a special token more.
        """
        ...


class Task(ABC):
    """One ability to be measured. Subclasses are frozen dataclasses with one file each.

    Attributes:
        name: the task's name on the command line.
        unit: the unit of `Score.value`, such as "recall" or "nats a token".
        floor: the least mean that the dense model must reach for a comparison to mean anything.
            None if the unit has no such mean: dense need only be above the lower line.
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

    def with_questions(self, questions: int) -> Task:
        """The task with up to so many questions about each context; see `Sample.more`.

        Raises:
            KVPruneError: the task asks one question about each context.
        """
        raise KVPruneError(
            f"{self.name}: --questions {questions}: it asks one question about each context: "
            f"expected squad, hotpotqa or JSON lines, or --questions 1"
        )

    def following(self, sample: Sample, tokenizer: Any) -> int:
        """The most tokens that may follow a sample's prompt; a model must have room for them."""
        return 0

    @abstractmethod
    def score(self, sample: Sample, reader: Reader) -> Score:
        """Asks the reader, once, and scores what it says."""
