"""A task whose question is not known when its context is compressed, as where a prefix is reused.

The context alone is the prompt then: budgets are shares of it, and what is asked at a prompt's end
is asked there. The question is read behind it, as generated tokens are read: a policy that is asked
once, at the prompt's end, has had its say; one that is asked in every step goes on. All questions
about a context are asked of copies of one compressed cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import KVPruneError
from .base import Reader, Sample, Score, Task

BEHIND = ", question unknown"
"""What stands behind the name of such a task."""


@dataclass(frozen=True)
class QuestionUnknown(Task):
    """Another task, whose context is compressed before the question is read.

    Attributes:
        known: the other task.
    """

    known: Task

    @property
    def name(self) -> str:  # type: ignore[override]
        """The other task's name, and what is unknown."""
        return self.known.name + BEHIND

    @property
    def unit(self) -> str:  # type: ignore[override]
        """The other task's unit."""
        return self.known.unit

    @property
    def floor(self) -> float | None:  # type: ignore[override]
        """The other task's floor."""
        return self.known.floor

    def samples(self, tokenizer: Any, context: int, count: int, seed: int) -> Sequence[Sample]:
        """The other task's samples, of which the question is read behind the context.

        Raises:
            KVPruneError: the other task has no question behind its context.
        """
        found = self.known.samples(tokenizer, context, count, seed)
        for sample in found:
            if not all(0 < one.context < len(one.prompt) for one in sample.questions):
                raise KVPruneError(
                    f"{self.known.name}: its prompts have no question behind their context, so "
                    f"that none can be unknown: expected another task, as squad, or "
                    f"--question known"
                )
        return [_behind_the_context(sample) for sample in found]

    def with_questions(self, questions: int) -> Task:
        """The other task with so many questions."""
        return QuestionUnknown(self.known.with_questions(questions))

    def following(self, sample: Sample, tokenizer: Any) -> int:
        """What may follow a prompt of the other task."""
        return self.known.following(sample, tokenizer)

    def score(self, sample: Sample, reader: Reader) -> Score:
        """The other task's score."""
        return self.known.score(sample, reader)


def _behind_the_context(sample: Sample) -> Sample:
    more = tuple(map(_behind_the_context, sample.more))
    return replace(sample, behind=len(sample.prompt) - sample.context, more=more)
