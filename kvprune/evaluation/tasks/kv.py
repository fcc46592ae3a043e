"""Key-value retrieval: the value of one key in a JSON object of many pairs that look alike.

Every pair could be the one that is asked for, so what is measured is what a policy loses when
nothing in the text stands out. After Liu et al., "Lost in the middle" (arXiv 2307.03172, section
4), with its prompt. Keys are words of Paul Graham's essays and values numbers of seven digits,
where the paper has UUIDs for both, which are harder. The answer begins with the key and an opening
quote. Bare is the question with an empty object, so the lower line is 0.

SmolLM2-135M finds 0.90 and 0.80 at 512 and 1024 tokens (ten samples, bench/results/tasks.json).
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
    """One pair of the object is asked for, as often one as another."""

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
    """Pairs of any key but the first word; with a number behind it where the words run out."""
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
