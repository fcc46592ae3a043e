"""Needles in a haystack: numbers, each in a sentence of its own, somewhere in essays.

The tasks measure whether a text that was read once, and did not look worth keeping, is still there
when a question at the end asks for it. They follow RULER (arXiv 2404.06654, section 3 and appendix
B), with RULER's template and with Paul Graham's essays as the haystack. They differ in three
things: a key is two words of the essays, not an adjective and a noun; depths are drawn, not taken
from forty steps; a number counts only as a whole. The prompt without the context is the question
without the essays, so the lower line is 0.

SmolLM2-135M always finds a single number at 512 and 1024 tokens. Of the four numbers of two keys it
finds 0.80 and 0.78 (ten samples, bench/results/tasks.json).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import KVPruneError
from .base import Reader, Sample, Score
from .prompts import Ask, Filled, Plan
from .scoring import RECALL, recall
from .texts import essay, essay_start, number, sprinkled, vocabulary

# Seven digits, a space and a separator, with something to spare.
_TOKENS = 12


class _Needles(Filled):
    """The common part of both tasks."""

    def score(self, sample: Sample, reader: Reader) -> Score:
        """See `Task.score`."""
        return recall(sample, reader, self.following(sample, None))

    def following(self, sample: Sample, tokenizer: Any) -> int:
        """See `Task.following`."""
        return _TOKENS * len(sample.answers) + 4


@dataclass(frozen=True)
class Needle(_Needles):
    """One number of seven digits, in essays."""

    name: ClassVar[str] = "needle"
    unit: ClassVar[str] = RECALL
    floor: ClassVar[float | None] = 0.5

    def plan(self, draw: random.Random) -> Plan:
        """See `Filled.plan`."""
        return _plan(draw, 1, 1, 1)


@dataclass(frozen=True)
class MultiNeedle(_Needles):
    """Several keys with several numbers each; all numbers of some of the keys are asked for.

    RULER's three variants are (keys=4), (values=4) and (keys=4, queries=4), with 1 for the rest.

    Attributes:
        keys: the number of keys.
        values: the numbers of each key.
        queries: the number of keys that are asked for.
    """

    name: ClassVar[str] = "multi-needle"
    unit: ClassVar[str] = RECALL
    floor: ClassVar[float | None] = 0.5
    keys: int = 2
    values: int = 2
    queries: int = 2

    def __post_init__(self) -> None:
        """Refuses fewer keys than are asked for, and no query or value at all.

        Raises:
            KVPruneError: `keys` is less than `queries`, or `queries` or `values` is less than 1.
        """
        if not (1 <= self.queries <= self.keys and self.values >= 1):
            raise KVPruneError(
                "multi-needle: expected at least one query and value, and as many keys as"
                f" queries, got {self}"
            )

    def plan(self, draw: random.Random) -> Plan:
        """See `Filled.plan`."""
        return _plan(draw, self.keys, self.values, self.queries)


def _plan(draw: random.Random, count: int, values: int, queries: int) -> Plan:
    words = draw.sample(vocabulary(), 2 * count)
    keys = [f"{one}-{two}" for one, two in zip(words[::2], words[1::2], strict=True)]
    held = {key: [number(draw) for _ in range(values)] for key in keys}
    needles = [
        (draw.random(), f"One of the special magic numbers for {key} is: {value}.")
        for key, numbers in held.items()
        for value in numbers
    ]
    start, asked = essay_start(draw), keys[:queries]
    answers = tuple(value for key in asked for value in held[key])
    return Plan(_ask(asked, answers), lambda n: sprinkled(essay(start, n), needles), answers)


def _ask(keys: list[str], answers: tuple[str, ...]) -> Ask:
    """RULER's template, in the singular for one number."""
    named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    one = len(answers) == 1
    numbers = f"special magic {'number' if one else 'numbers'} for {named}"
    return Ask(
        "Some special magic numbers are hidden within the following text. Make sure to memorize"
        " it. I will quiz you about the numbers afterwards.\n",
        f"\nWhat {'is the' if one else 'are all the'} {numbers} mentioned in the provided text?",
        f"The {numbers} mentioned in the provided text {'is:' if one else 'are'}",
    )
