"""Questions about articles, SQuAD and HotpotQA: how likely the gold answer is.

What is measured is what a policy loses of a text in which nothing is made up to stand out: the mean
log-likelihood of the gold answer's tokens behind the prompt, teacher-forced. (Small models fail to
answer freely: F1 0.13 for SmolLM2-135M on SQuAD, so that exact match would measure noise.) SQuAD
(Rajpurkar et al., arXiv 1606.05250) needs one paragraph of an article, HotpotQA (Yang et al., arXiv
1809.09600) sentences of two. Both as RULER has them (arXiv 2404.06654, section 3: question
answering), with paragraphs that say nothing about it. The questions are the "final" split of
`kvprune.evaluation.data.questions`, which the heads that ship have not been trained on.

Where the article, or the entry, has less text than the context has room, whole paragraphs of other
final questions are put around it. A prompt is shorter than the context by less than a paragraph,
mostly. Bare is the question alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from ..data.questions import ASK, LongQuestion, hotpotqa, squad
from .base import Reader, Sample, Score, Task
from .prompts import Ask, refuse_few, seeded
from .scoring import LIKELIHOOD, answer_tokens, likelihood

_MAKE = {"squad": squad, "hotpotqa": hotpotqa}
_GAP = "\n\n"
# More questions than either has.
_ALL = 10**6
# So many paragraphs that did not fit: there is no room left.
_TRIES = 20
# So many of the longest questions by characters: the longest by tokens is one of them.
_LONGEST = 20


class _Articles(Task):
    """What both have in common."""

    def samples(self, tokenizer: Any, context: int, count: int, seed: int) -> Sequence[Sample]:
        """See `Task.samples`; questions whose own paragraphs do not fit are left out."""
        room = context - _beside(self.name, tokenizer)
        found, seen, more = list[Sample](), 0, 2 * count
        while len(found) < count and more:
            # The first ones are the same whatever number is asked for.
            questions = _MAKE[self.name]("final", seen + more, (room, room), tokenizer, seed)
            for question in questions[seen:]:
                draw = seeded(self.name, context, seed, len(found))
                prompt = _filled(self.name, question, tokenizer, context, draw)
                found += [_sample(len(found), question, prompt, tokenizer)] if prompt else []
            seen, more = len(questions), (seen + more) * (len(questions) == seen + more)
        refuse_few(self.name, context, len(found), count)
        return found[:count]

    def score(self, sample: Sample, reader: Reader) -> Score:
        """See `Task.score`."""
        return likelihood(sample, reader)

    def following(self, sample: Sample, tokenizer: Any) -> int:
        """See `Task.following`."""
        return answer_tokens(sample, tokenizer)


@dataclass(frozen=True)
class Squad(_Articles):
    """A question about consecutive paragraphs of an article in Wikipedia."""

    name: ClassVar[str] = "squad"
    unit: ClassVar[str] = LIKELIHOOD


@dataclass(frozen=True)
class HotpotQA(_Articles):
    """A question that takes sentences of two paragraphs, among others that look alike."""

    name: ClassVar[str] = "hotpotqa"
    unit: ClassVar[str] = LIKELIHOOD


class _Uncounted:
    """Finds no tokens anywhere, so that every paragraph fits."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """None."""
        return []


@cache
def _final(name: str) -> tuple[tuple[str, ...], tuple[LongQuestion, ...]]:
    """Of all final questions the paragraphs, and the longest questions."""
    questions = _MAKE[name]("final", _ALL, (1, 1), _Uncounted())
    paragraphs = dict.fromkeys(p for q in questions for p in q.text.strip().split(_GAP))
    longest = sorted(questions, key=lambda q: len(q.question), reverse=True)[:_LONGEST]
    return tuple(paragraphs), tuple(longest)


def _beside(name: str, tokenizer: Any) -> int:
    """The most tokens that a prompt has beside its context."""
    return max(len(_ask(question).ids(tokenizer)) for question in _final(name)[1])


def _ask(question: LongQuestion) -> Ask:
    before, after = ASK[0].split("{context}")
    return Ask(before, after.format(question=question.question), ASK[1])


def _sample(number: int, question: LongQuestion, prompt: tuple[int, ...], tokenizer: Any) -> Sample:
    return Sample(number, prompt, _ask(question).ids(tokenizer), (question.answer,))


def _filled(
    name: str, question: LongQuestion, tokenizer: Any, context: int, draw: random.Random
) -> tuple[int, ...] | None:
    """The prompt with what else fits around the question's own text; None if that does not."""
    ask, own = _ask(question), question.text.strip()
    room = context - len(ask.ids(tokenizer, own))
    others = [(draw.random() < 0.5, p) for p in _others(name, question, tokenizer, room, draw)]
    # The parts alone may have a token less than together.
    for count in range(len(others), -1, -1):
        before = [p for first, p in others[:count] if first]
        after = [p for first, p in others[:count] if not first]
        prompt = ask.ids(tokenizer, _GAP.join([*before, own, *after]))
        if len(prompt) <= context:
            return prompt
    return None


def _others(
    name: str, question: LongQuestion, tokenizer: Any, room: int, draw: random.Random
) -> list[str]:
    """Paragraphs of other questions that do not have the answer, while there is room."""
    paragraphs = _final(name)[0]
    taken, tries, own = list[str](), 0, question.text
    for paragraph in draw.sample(paragraphs, len(paragraphs)):
        if tries == _TRIES or room <= 0:
            break
        if question.answer in paragraph or paragraph in own:
            continue
        size = len(tokenizer.encode(_GAP + paragraph, add_special_tokens=False))
        tries += size > room
        taken += [paragraph] if size <= room else []
        room -= size if size <= room else 0
    return taken
