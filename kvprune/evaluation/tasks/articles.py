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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
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


@dataclass(frozen=True)
class _Articles(Task):
    """The common part of both tasks.

    Attributes:
        questions: the most questions about one context.
    """

    questions: int = 1

    def samples(self, tokenizer: Any, context: int, count: int, seed: int) -> Sequence[Sample]:
        """See `Task.samples`; questions whose own paragraphs do not fit are left out."""
        found = list[Sample]()
        for asked in self._asked(tokenizer, context, count, seed):
            if len(found) == count:
                break
            draw = seeded(self.name, context, seed, len(found))
            text = _filled(self.name, asked, tokenizer, context, draw)
            found += [] if text is None else [_sample(len(found), asked, text, tokenizer)]
        refuse_few(self.name, context, len(found), count, self.questions)
        return found

    def _asked(
        self, tokenizer: Any, context: int, count: int, seed: int
    ) -> Iterator[list[LongQuestion]]:
        """The questions about each context in turn."""
        room = context - _beside(self.name, tokenizer)
        if self.questions > 1:
            # All questions are drawn: a smaller number might end within a context.
            drawn = _MAKE[self.name]("final", _ALL, (room, room), tokenizer, seed, self.questions)
            yield from _apart(drawn, self.questions)
            return
        seen, more = 0, 2 * count
        while more:
            # The first questions are the same, whatever number is asked for.
            drawn = _MAKE[self.name]("final", seen + more, (room, room), tokenizer, seed)
            yield from ([question] for question in drawn[seen:])
            seen, more = len(drawn), (seen + more) * (len(drawn) == seen + more)

    def with_questions(self, questions: int) -> Task:
        """See `Task.with_questions`."""
        return replace(self, questions=questions)

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


def _apart(drawn: Iterable[LongQuestion], most: int) -> Iterator[list[LongQuestion]]:
    """The questions about each context, up to a number; each context and question comes once."""
    texts, asked = set[str](), set[tuple[str, str]]()
    for text, same in groupby(drawn, key=lambda question: question.text):
        new = {(q.question, q.answer): q for q in same}
        left = [question for key, question in new.items() if key not in asked][:most]
        if not left or text in texts:
            continue
        texts.add(text)
        asked |= {(question.question, question.answer) for question in left}
        yield left


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


def _sample(number: int, asked: Sequence[LongQuestion], text: str, tokenizer: Any) -> Sample:
    found = list[Sample]()
    for question in asked:
        ask = _ask(question)
        prompt, before = ask.ids(tokenizer, text), ask.before_question(tokenizer, text)
        found.append(Sample(number, prompt, ask.ids(tokenizer), (question.answer,), before))
    return replace(found[0], more=tuple(found[1:]))


def _filled(
    name: str, asked: Sequence[LongQuestion], tokenizer: Any, context: int, draw: random.Random
) -> str | None:
    """The context, with as many other paragraphs as fit; None if the questions' own do not fit.

    Args:
        name: the task's name.
        asked: questions about the same context.
        tokenizer: counts the tokens.
        context: the most tokens of a prompt.
        draw: chooses the other paragraphs and their places.
    """
    own = asked[0].text.strip()
    sizes = {question: len(_ask(question).ids(tokenizer, own)) for question in asked}
    longest = _ask(max(sizes, key=lambda question: sizes[question]))
    room = context - max(sizes.values())
    others = [(draw.random() < 0.5, p) for p in _others(name, asked, tokenizer, room, draw)]
    # The parts may have a token less alone than they have together.
    for count in range(len(others), -1, -1):
        before = [p for first, p in others[:count] if first]
        after = [p for first, p in others[:count] if not first]
        text = _GAP.join([*before, own, *after])
        if len(longest.ids(tokenizer, text)) <= context:
            return text
    return None


def _others(
    name: str, asked: Sequence[LongQuestion], tokenizer: Any, room: int, draw: random.Random
) -> list[str]:
    """Paragraphs of other questions that hold no answer, as many as there is room for.

    Each paragraph is whole; their order is drawn.
    """
    paragraphs = _final(name)[0]
    taken, tries, own = list[str](), 0, asked[0].text
    for paragraph in draw.sample(paragraphs, len(paragraphs)):
        if tries == _TRIES or room <= 0:
            break
        if any(question.answer in paragraph for question in asked) or paragraph in own:
            continue
        size = len(tokenizer.encode(_GAP + paragraph, add_special_tokens=False))
        tries += size > room
        taken += [paragraph] if size <= room else []
        room -= size if size <= room else 0
    return taken
