"""What contexts are made of: Paul Graham's essays, as RULER has them, and their words."""

from __future__ import annotations

import random
from functools import cache

from ..data.assets import ruler_data

ESSAYS = "PaulGrahamEssays.json"
SENTENCE_ENDS = (".", "?", "!")


@cache
def essays() -> str:
    """All essays, one after the other."""
    return str(ruler_data(ESSAYS)["text"])


@cache
def essay_words() -> tuple[str, ...]:
    """The same, word by word."""
    return tuple(essays().split())


@cache
def vocabulary() -> tuple[str, ...]:
    """Plain words of 4 to 8 letters that the essays have more than once, by their letters."""
    seen, again = set[str](), set[str]()
    for word in essay_words():
        (again if word in seen else seen).add(word)
    return tuple(sorted(w for w in again if _is_plain(w)))


def _is_plain(word: str) -> bool:
    return word.isascii() and word.isalpha() and word.islower() and 4 <= len(word) <= 8


@cache
def _starts() -> tuple[int, ...]:
    """Where sentences start, as numbers of words."""
    words = essay_words()
    return (0, *(i + 1 for i, word in enumerate(words[:-1]) if word.endswith(SENTENCE_ENDS)))


def essay_start(draw: random.Random) -> int:
    """Where some sentence starts."""
    return draw.choice(_starts())


def essay(start: int, count: int) -> list[str]:
    """So many words from there on, round and round."""
    words, found = essay_words(), list[str]()
    while len(found) < count:
        found += words[start : start + count - len(found)]
        start = 0
    return found


def number(draw: random.Random) -> str:
    """One of seven digits."""
    return str(draw.randrange(10**6, 10**7))


def sprinkled(words: list[str], sentences: list[tuple[float, str]]) -> str:
    """A text of the words, with each sentence between two of theirs at its depth from 0 to 1."""
    ends = [0, *(i + 1 for i, word in enumerate(words) if word.endswith(SENTENCE_ENDS))]
    pieces, last = list[str](), 0
    for depth, text in sorted(sentences):
        place = ends[int(depth * len(ends))]
        pieces += [*words[last:place], text]
        last = place
    return " ".join([*pieces, *words[last:]])
