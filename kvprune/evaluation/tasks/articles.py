"""Questions about articles, SQuAD and HotpotQA: the likelihood of the gold answer.

The tasks measure what a policy loses of a text in which nothing is made up to stand out. The score
is the mean log-likelihood of the gold answer's tokens behind the prompt, teacher-forced. (Small
models fail to answer freely: SmolLM2-135M has an F1 of 0.13 on SQuAD, so exact match would measure
noise.) A question of SQuAD (Rajpurkar et al., arXiv 1606.05250) needs one paragraph of an article;
a question of HotpotQA (Yang et al., arXiv 1809.09600) needs sentences of two. Both stand, as in
RULER (arXiv 2404.06654, section 3: question answering), among paragraphs that do not help to
answer. The questions are the "final" split of `kvprune.evaluation.data.questions`, on which the
heads that ship have not been trained.

If the article, or the entry of HotpotQA, is shorter than the context, whole paragraphs of other
final questions are put around it. A prompt is then shorter than the context by less than a
paragraph, mostly. The prompt without the context (`Sample.bare`) is the question alone.
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
# More questions than either data set has.
_ALL = 10**6
# After this number of paragraphs that did not fit, there is no room left.
_TRIES = 20
# The longest question by tokens is one of this number of longest questions by characters.
_LONGEST = 20


class _Articles(Task):
    """The common part of both tasks."""

    def samples(self, tokenizer: Any, context: int, count: int, seed: int) -> Sequence[Sample]:
        """See `Task.samples`; questions whose own paragraphs do not fit are left out."""
        room = context - _beside(self.name, tokenizer)
        found, seen, more = list[Sample](), 0, 2 * count
        while len(found) < count and more:
            # The first questions are the same, whatever number is asked for.
            questions = _MAKE[self.name]("final", seen + more, (room, room), tokenizer, seed)
            for question in questions[seen:]:
                draw = seeded(self.name, context, seed, len(found))
                text = _filled(self.name, question, tokenizer, context, draw)
                found += [] if text is None else [_sample(len(found), question, text, tokenizer)]
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
    """A question that needs sentences of two paragraphs, among paragraphs that look alike."""

    name: ClassVar[str] = "hotpotqa"
    unit: ClassVar[str] = LIKELIHOOD


class _Uncounted:
    """A tokenizer that finds no tokens in any text, so that every paragraph fits."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """No tokens."""
        return []


@cache
def _final(name: str) -> tuple[tuple[str, ...], tuple[LongQuestion, ...]]:
    """The paragraphs of all final questions, and the longest of these questions."""
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


def _sample(number: int, question: LongQuestion, text: str, tokenizer: Any) -> Sample:
    ask = _ask(question)
    prompt, before = ask.ids(tokenizer, text), ask.before_question(tokenizer, text)
    return Sample(number, prompt, ask.ids(tokenizer), (question.answer,), before)


def _filled(
    name: str, question: LongQuestion, tokenizer: Any, context: int, draw: random.Random
) -> str | None:
    """The context, with as many other paragraphs as fit; None if the question's own do not fit."""
    ask, own = _ask(question), question.text.strip()
    room = context - len(ask.ids(tokenizer, own))
    others = [(draw.random() < 0.5, p) for p in _others(name, question, tokenizer, room, draw)]
    # The parts may have a token less alone than they have together.
    for count in range(len(others), -1, -1):
        before = [p for first, p in others[:count] if first]
        after = [p for first, p in others[:count] if not first]
        text = _GAP.join([*before, own, *after])
        if len(ask.ids(tokenizer, text)) <= context:
            return text
    return None


def _others(
    name: str, question: LongQuestion, tokenizer: Any, room: int, draw: random.Random
) -> list[str]:
    """Paragraphs of other questions that do not hold the answer, as many as there is room for.

    Each paragraph is whole; their order is drawn.
    """
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
