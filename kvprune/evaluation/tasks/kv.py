"""Key-value retrieval: the value of one key in a JSON object of many pairs that look alike.

Every pair could be the one that is asked for. So the task measures what a policy loses if nothing
in the text stands out. It follows Liu et al., "Lost in the middle" (arXiv 2307.03172, section 4),
with that paper's prompt. Keys are words of Paul Graham's essays, and values are numbers of seven
digits; the paper has UUIDs for both, which are harder. The answer begins with the key and an
opening quote. The prompt without the context is the question with an empty object, so the lower
line is 0.

SmolLM2-135M has a recall of 0.90 and 0.80 at 512 and 1024 tokens (ten samples,
bench/results/tasks.json).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Reader, Sample, Score
from .prompts import Ask, Filled, Plan
from .scoring import RECALL, recall
from .texts import number, vocabulary

_TOKENS = 12


@dataclass(frozen=True)
class KeyValue(Filled):
    """One pair of the object is asked for; each pair is asked for equally often."""

    name: ClassVar[str] = "kv"
    unit: ClassVar[str] = RECALL
    floor: ClassVar[float | None] = 0.4

    def plan(self, draw: random.Random) -> Plan:
        """See `Filled.plan`."""
        words = draw.sample(vocabulary(), len(vocabulary()))
        value, depth, others = number(draw), draw.random(), draw.random()

        def text(count: int) -> str:
            pairs = _pairs(words, count - 1, others)
            pairs.insert(int(depth * count), f'"{words[0]}": "{value}"')
            return ",\n ".join(pairs)

        return Plan(_ask(words[0]), text, (value,), least=1)

    def score(self, sample: Sample, reader: Reader) -> Score:
        """See `Task.score`."""
        return recall(sample, reader, _TOKENS)

    def following(self, sample: Sample, tokenizer: Any) -> int:
        """See `Task.following`."""
        return _TOKENS


def _pairs(words: list[str], count: int, seed: float) -> list[str]:
    """Pairs with any key but the first word.

    When the words are used up, they come again with a number behind them.
    """
    draw = random.Random(seed)
    keys = (divmod(i, len(words) - 1) for i in range(count))
    names = [words[1 + i] + (f"-{again}" if again else "") for again, i in keys]
    return [f'"{name}": "{number(draw)}"' for name in names]


def _ask(key: str) -> Ask:
    return Ask(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        "JSON data:\n{",
        f'}}\n\nKey: "{key}"\nCorresponding value:',
        f'"{key}": "',
    )
