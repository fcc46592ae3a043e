"""Variable tracking: the variables with a value that was handed from one to the next.

A value is given to a variable, that variable to another, and so on, in sentences that lie apart in
noise. All variables that have the value are asked for. So the task measures whether all links of a
chain are still there, also those that nothing at the end names. It follows RULER (arXiv 2404.06654,
section 3 and appendix B), with RULER's template, noise, and solved example before the question. The
chain has one link by default and not four. The noise is cut at a word and not after its five
sentences, so that the length can be met. The prompt without the context lacks the noise and the
chain; the example is still there.

SmolLM2-135M finds 0.75 and 0.70 of the two variables at 512 and 1024 tokens (ten samples,
bench/results/tasks.json).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from ...errors import KVPruneError
from .base import Reader, Sample, Score
from .prompts import Ask, Filled, Plan
from .scoring import RECALL, recall
from .texts import sprinkled

_SENTENCES = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
_NOISE = _SENTENCES.split()
_EXAMPLE_WORDS = 2 * len(_NOISE)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A name of five letters, with "VAR " and a comma.
_TOKENS = 10


@dataclass(frozen=True)
class _Chain:
    """A chain of variables.

    Attributes:
        names: the names of the variables, in order.
        value: the value that all of them have.
        sentences: the sentences that hand it on, each with its depth in the noise from 0 to 1.
    """

    names: tuple[str, ...]
    value: str
    sentences: list[tuple[float, str]]

    def hidden(self, words: int) -> str:
        """The sentences of the chain, in this number of words of noise."""
        return sprinkled((_NOISE * (words // len(_NOISE) + 1))[:words], self.sentences)


@dataclass(frozen=True)
class Tracking(Filled):
    """One chain of `hops` links: hops + 1 variables to find."""

    name: ClassVar[str] = "tracking"
    unit: ClassVar[str] = RECALL
    floor: ClassVar[float | None] = 0.5
    hops: int = 1

    def __post_init__(self) -> None:
        """Refuses a chain without a link.

        Raises:
            KVPruneError: `hops` is less than 1.
        """
        if self.hops < 1:
            raise KVPruneError(f"tracking: expected at least 1 hop, got {self.hops}")

    def plan(self, draw: random.Random) -> Plan:
        """See `Filled.plan`."""
        shown, asked = _chain(draw, 3, self.hops), _chain(draw, 5, self.hops)
        example, ask = _ask(shown), _ask(asked)
        solved = f"{example.before}{shown.hidden(_EXAMPLE_WORDS)}{example.after}\n{example.lead}"
        before = f"{solved} {', '.join(shown.names)}\n\n{ask.before}"
        return Plan(Ask(before, ask.after, ask.lead), asked.hidden, asked.names)

    def score(self, sample: Sample, reader: Reader) -> Score:
        """See `Task.score`."""
        return recall(sample, reader, self.following(sample, None))

    def following(self, sample: Sample, tokenizer: Any) -> int:
        """See `Task.following`."""
        return _TOKENS * len(sample.answers)


def _chain(draw: random.Random, letters: int, hops: int) -> _Chain:
    names = list[str]()
    while len(names) <= hops:
        name = "".join(draw.choices(_LETTERS, k=letters))
        names += [name] if name not in names else []
    value = str(draw.randrange(10**4, 10**5))
    sentences = [f"VAR {names[0]} = {value}."]
    sentences += [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
    depths = sorted(draw.random() for _ in sentences)
    return _Chain(tuple(names), value, list(zip(depths, sentences, strict=True)))


def _ask(chain: _Chain) -> Ask:
    return Ask(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        f"\nQuestion: Find all variables that are assigned the value {chain.value} in the text"
        " above.",
        "Answer: According to the chain(s) of variable assignment in the text above,"
        f" {len(chain.names)} variables are assigned the value {chain.value}, they are:",
    )
