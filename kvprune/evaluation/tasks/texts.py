"""The material of contexts: Paul Graham's essays, as RULER has them, and their words."""

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
    """All words of the essays, in their order."""
    return tuple(essays().split())


@cache
def vocabulary() -> tuple[str, ...]:
    """Plain words of 4 to 8 letters that the essays have more than once, in alphabetical order."""
    seen, again = set[str](), set[str]()
    for word in essay_words():
        (again if word in seen else seen).add(word)
    return tuple(sorted(w for w in again if _is_plain(w)))


def _is_plain(word: str) -> bool:
    return word.isascii() and word.isalpha() and word.islower() and 4 <= len(word) <= 8


@cache
def _starts() -> tuple[int, ...]:
    """The words with which sentences start, as their numbers."""
    words = essay_words()
    return (0, *(i + 1 for i, word in enumerate(words[:-1]) if word.endswith(SENTENCE_ENDS)))


def essay_start(draw: random.Random) -> int:
    """The number of a word with which some sentence starts."""
    return draw.choice(_starts())


def essay(start: int, count: int) -> list[str]:
    """The `count` words from number `start` on; the essays begin again when they end."""
    words, found = essay_words(), list[str]()
    while len(found) < count:
        found += words[start : start + count - len(found)]
        start = 0
    return found


def number(draw: random.Random) -> str:
    """A number of seven digits."""
    return str(draw.randrange(10**6, 10**7))


def sprinkled(words: list[str], sentences: list[tuple[float, str]]) -> str:
    """The words as a text, with more sentences put in between theirs.

    Args:
        words: the words of the text.
        sentences: the sentences to put in, each with its depth in the text from 0 to 1.
    """
    ends = [0, *(i + 1 for i, word in enumerate(words) if word.endswith(SENTENCE_ENDS))]
    pieces, last = list[str](), 0
    for depth, text in sorted(sentences):
        place = ends[int(depth * len(ends))]
        pieces += [*words[last:place], text]
        last = place
    return " ".join([*pieces, *words[last:]])
