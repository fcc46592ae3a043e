"""Perplexity of a long document: the likelihood of the text behind a long stretch of it.

The prompt is `context` tokens of Paul Graham's essays, with the tokens that begin a text. The 128
tokens that follow are scored, teacher-forced: their mean log-likelihood (perplexity is exp of minus
that), and the means by distance from the prompt's end. The task follows the evaluations of
StreamingLLM (arXiv 2309.17453, section 4.1) and others. It is a sanity check more than a measure:
the next words mostly follow from the last ones, so a policy that keeps the last ones loses little,
whatever else it drops. The prompt without the context is the prompt's last 32 tokens, for what
these alone are good for.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...errors import KVPruneError
from .base import Reader, Sample, Score, Task
from .prompts import opening, refuse_short, seeded
from .scoring import LIKELIHOOD, mean
from .texts import essays

_BARE = 32
_STRETCH = 32
_FOLLOWING = 4 * _STRETCH
# A first guess, for English.
_CHARACTERS_A_TOKEN = 5


@dataclass(frozen=True)
class Stretch(Sample):
    """A stretch of a document, with the token ids that follow it.

    Attributes:
        following: the token ids. They are kept beside their text, the one answer, because not every
            tokenizer finds them again in that text.
    """

    following: tuple[int, ...] = field(kw_only=True)


@dataclass(frozen=True)
class Perplexity(Task):
    """The log-likelihood of the 128 tokens behind a stretch of essays."""

    name: ClassVar[str] = "perplexity"
    unit: ClassVar[str] = LIKELIHOOD

    def samples(self, tokenizer: Any, context: int, count: int, seed: int) -> Sequence[Stretch]:
        """See `Task.samples`; each prompt has exactly `context` tokens."""
        first = opening(tokenizer)
        refuse_short(self.name, context, len(first) + _BARE + 1)
        draws = (seeded(self.name, context, seed, i) for i in range(count))
        size = context - len(first)
        texts = [_tokens(tokenizer, start, size + _FOLLOWING) for start in _starts(draws)]
        return [_stretch(i, first, ids, size, tokenizer) for i, ids in enumerate(texts)]

    def score(self, sample: Sample, reader: Reader) -> Score:
        """See `Task.score`; `parts` has the mean of each stretch of 32 tokens."""
        assert isinstance(sample, Stretch)
        values = reader.log_likelihood(sample.following)
        parts = {
            f"tokens {i + 1}-{i + _STRETCH}": mean(values[i : i + _STRETCH])
            for i in range(0, _FOLLOWING, _STRETCH)
        }
        return Score(mean(values), parts)

    def following(self, sample: Sample, tokenizer: Any) -> int:
        """See `Task.following`."""
        return _FOLLOWING


def _stretch(
    number: int, first: tuple[int, ...], ids: list[int], size: int, tokenizer: Any
) -> Stretch:
    before, following = ids[:size], ids[size:]
    answer = tokenizer.decode(following)
    prompt, bare = (*first, *before), (*first, *before[-_BARE:])
    return Stretch(number, prompt, bare, (answer,), following=tuple(following))


def _starts(draws: Iterable[random.Random]) -> list[int]:
    """Starts of sentences in the essays' first half, no two of them the same."""
    text, found = essays(), list[int]()
    for draw in draws:
        start = None
        while start is None or start in found:
            start = text.find(". ", int(draw.random() * len(text) / 2)) + 2
        found.append(start)
    return found


def _tokens(tokenizer: Any, start: int, count: int) -> list[int]:
    """The `count` tokens from a place in the essays on.

    Raises:
        KVPruneError: the essays have fewer tokens from there on.
    """
    text = essays()
    characters = count * _CHARACTERS_A_TOKEN
    while True:
        ids = list(tokenizer.encode(text[start : start + characters], add_special_tokens=False))
        # The last token may be cut off with the text, so one token more is needed.
        if len(ids) > count:
            return ids[:count]
        if start + characters >= len(text):
            raise KVPruneError(
                f"perplexity: expected a context that the essays can fill, got {count} tokens with"
                f" what follows, where they have {len(ids)} from a start on; take a shorter one"
            )
        characters *= 2
