"""Common words: the words that a long list has more often than the others.

The task measures whether a policy keeps what is spread over the whole text and matters only by its
number. It follows RULER's common words extraction (arXiv 2404.06654, section 3 and appendix B),
with RULER's template. A small model cannot count, so by default there is one common word and not
ten. The common word makes up the same share of a list of any length, while RULER repeats it 30
times. The other words, of Paul Graham's essays, come once each, and again only if the list is
longer than the words suffice for. There is no solved example, while RULER has one. The prompt
without the context is the question without the list, so the lower line is 0.

SmolLM2-135M always finds the one word at 512 and 1024 tokens (ten samples,
bench/results/tasks.json).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any, ClassVar

from ...errors import KVPruneError
from .base import Reader, Sample, Score
from .prompts import Ask, Filled, Plan
from .scoring import RECALL, recall
from .texts import vocabulary

# A word of up to eight letters, with its number.
_TOKENS = 8


@dataclass(frozen=True)
class Words(Filled):
    """The `common` most common words, which together are a `share` of the list."""

    name: ClassVar[str] = "words"
    unit: ClassVar[str] = RECALL
    floor: ClassVar[float | None] = 0.5
    common: int = 1
    share: float = 0.5

    def __post_init__(self) -> None:
        """Refuses a list without common words, or without others.

        Raises:
            KVPruneError: `common` is less than 1, or `share` is not between 0 and 1.
        """
        if not (self.common >= 1 and 0 < self.share < 1):
            raise KVPruneError(
                f"words: expected a common word and a share between 0 and 1, got {self}"
            )

    def plan(self, draw: random.Random) -> Plan:
        """See `Filled.plan`."""
        ask = _ask(self.common)
        said = f"{ask.before}{ask.after}{ask.lead}".lower()
        words = [word for word in draw.sample(vocabulary(), len(vocabulary())) if word not in said]
        common, others, order = words[: self.common], words[self.common :], draw.random()
        # In a shorter list a common word might come only once, as the others do.
        least = round(4 * self.common / self.share)

        def text(count: int) -> str:
            return _listed(self._words(count, common, others), order)

        return Plan(ask, text, tuple(common), least)

    def score(self, sample: Sample, reader: Reader) -> Score:
        """See `Task.score`."""
        return recall(sample, reader, self.following(sample, None))

    def following(self, sample: Sample, tokenizer: Any) -> int:
        """See `Task.following`."""
        return _TOKENS * len(sample.answers) + 4

    def _words(self, count: int, common: list[str], others: list[str]) -> list[str]:
        often = common * round(count * self.share / self.common)
        return list(islice(chain(often, cycle(others)), count))


def _listed(words: list[str], order: float) -> str:
    random.Random(order).shuffle(words)
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _ask(common: int) -> Ask:
    """RULER's template, in the plural for one word too.

    SmolLM2-135M found 6 of 10 words when asked in the singular, and all 10 when asked in the
    plural.
    """
    return Ask(
        "Below is a numbered list of words. In these words, some appear more often than others."
        " Memorize the ones that appear most often.\n",
        f"\nQuestion: What are the {common} most common words in the above list?",
        f"Answer: The top {common} words that appear most often in the list are: 1.",
    )
