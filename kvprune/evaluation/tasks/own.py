"""A task of the user's own: JSON lines, each with a context, a question and its answer.

    {"context": "...", "question": "...", "answer": "..."}

`answer` may be a list of texts, each of which is then looked for. By default the score is recall:
the share of the answers that stand in the text that the model generates. If a line has `"score":
"likelihood"`, the whole file is scored by the log-likelihood of the answer instead, which tells
more if the model answers in sentences. Other keys are ignored. The prompt is the context, the
question and "Answer:". A context is never cut, so a prompt that is longer than the context length
is refused. The prompt without the context is the question alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ...errors import KVPruneError
from .base import Reader, Sample, Score, Task
from .prompts import Ask, refuse_few
from .scoring import LIKELIHOOD, RECALL, answer_tokens, likelihood, recall

WAYS = ("recall", "likelihood")
_TOKENS_BEFORE = 16


@dataclass(frozen=True)
class Line:
    """One line of the file, checked.

    Attributes:
        number: the number of the line, from 1.
        context: the context.
        question: the question.
        answers: the answers.
    """

    number: int
    context: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Own(Task):
    """A file of JSON lines as a task; made by `own`.

    Attributes:
        path: the path, as it was given.
        lines: the lines of the file.
        way: the way of scoring, one of `WAYS`.
        questions: the most questions about one context: of the lines that have the same one, so
            many are one sample. With 1, each line is a sample.
    """

    path: str
    lines: tuple[Line, ...]
    way: str
    questions: int = 1

    @property
    def name(self) -> str:  # type: ignore[override]
        """The path, as it was given."""
        return self.path

    @property
    def unit(self) -> str:  # type: ignore[override]
        """The unit of the file's way of scoring."""
        return RECALL if self.way == "recall" else LIKELIHOOD

    def samples(self, tokenizer: Any, context: int, count: int, seed: int) -> Sequence[Sample]:
        """See `Task.samples`; the seed chooses the lines, the same ones at every context.

        Raises:
            KVPruneError: fewer lines (or contexts, with several questions about one) than asked
                for, or a line whose prompt is too long.
        """
        lines = random.Random(f"{seed}").sample(self.lines, len(self.lines))
        asked = dict[Any, list[Line]]()
        for line in lines:
            asked.setdefault(line.context if self.questions > 1 else line, []).append(line)
        refuse_few(self.name, context, len(asked), count, self.questions)
        chosen = [same[: self.questions] for same in list(asked.values())[:count]]
        found = [
            [_sample(number, line, tokenizer) for line in same]
            for number, same in enumerate(chosen)
        ]
        self._refuse_long(list(chain(*chosen)), list(chain(*found)), context)
        return [replace(first, more=tuple(more)) for first, *more in found]

    def with_questions(self, questions: int) -> Task:
        """See `Task.with_questions`."""
        return replace(self, questions=questions)

    def score(self, sample: Sample, reader: Reader) -> Score:
        """See `Task.score`."""
        if self.way == "likelihood":
            return likelihood(sample, reader)
        return recall(sample, reader, _most(sample))

    def following(self, sample: Sample, tokenizer: Any) -> int:
        """See `Task.following`."""
        return answer_tokens(sample, tokenizer) if self.way == "likelihood" else _most(sample)

    def _refuse_long(self, lines: list[Line], found: list[Sample], context: int) -> None:
        sizes = [len(sample.prompt) for sample in found]
        longest = max(range(len(sizes)), key=lambda at: sizes[at], default=None)
        if longest is not None and sizes[longest] > context:
            raise KVPruneError(
                f"{self.path}, line {lines[longest].number}: expected a prompt of at most"
                f" {context} tokens, got {sizes[longest]}; ask for a context of that many, or"
                " shorten the line's context"
            )


def own(path: str) -> Own:
    """The task of a file of JSON lines.

    Raises:
        KVPruneError: there is no such file, it has no line, or a line is not as it has to be; the
            message has the line's number.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise KVPruneError(f"{path}: expected a file of JSON lines in UTF-8: {error}") from error
    # `splitlines` would also split at other line ends, which JSON texts may hold as they are.
    written = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not written:
        raise KVPruneError(f"{path}: expected at least one line of JSON, got none")
    found = [(n, _mapping(f"{path}, line {n}", line)) for n, line in written]
    lines = tuple(_line(f"{path}, line {n}", n, given) for n, given in found)
    way = _way(path, found)
    _refuse_lists(path, lines, way)
    return Own(path, lines, way)


def _most(sample: Sample) -> int:
    """The most tokens that all answers may take."""
    # A token has one character or more, in nearly all tokenizers and languages.
    return _TOKENS_BEFORE + sum(map(len, sample.answers))


def _mapping(where: str, line: str) -> Mapping[str, object]:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise KVPruneError(f"{where}: expected JSON: {error}") from error
    if not isinstance(given, dict):
        raise KVPruneError(f"{where}: expected a JSON object, got {type(given).__name__}")
    return given


def _line(where: str, number: int, given: Mapping[str, object]) -> Line:
    context, question = (_text(where, key, given.get(key)) for key in ("context", "question"))
    answer = given.get("answer")
    answers = answer if isinstance(answer, list) and answer else [answer]
    return Line(number, context, question, tuple(_text(where, "answer", one) for one in answers))


def _text(where: str, key: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip() or not _is_unicode(value):
        texts = "a text, or a list of them," if key == "answer" else "a text"
        raise KVPruneError(f"{where}: expected {texts} as {key!r}, got {json.dumps(value)}")
    return value.strip() if key == "answer" else value


def _is_unicode(text: str) -> bool:
    """Whether the text has no halves of characters, which JSON can hold and no tokenizer reads."""
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def _way(path: str, found: list[tuple[int, Mapping[str, object]]]) -> str:
    """The way of scoring that the lines name; all lines that name one must name the same.

    Raises:
        KVPruneError: an unknown way, or two different ones.
    """
    said = [(number, given["score"]) for number, given in found if "score" in given]
    for number, way in said:
        if way not in WAYS or way != said[0][1]:
            expected = " or ".join(WAYS) if way not in WAYS else f"{said[0][1]!r}, as before,"
            raise KVPruneError(
                f"{path}, line {number}: expected {expected} as 'score', got {json.dumps(way)}"
            )
    return str(said[0][1]) if said else WAYS[0]


def _refuse_lists(path: str, lines: tuple[Line, ...], way: str) -> None:
    for line in lines:
        if way == "likelihood" and len(line.answers) > 1:
            raise KVPruneError(
                f"{path}, line {line.number}: expected one answer, since the file is scored by"
                f" likelihood, got {len(line.answers)}"
            )


def _sample(number: int, line: Line, tokenizer: Any) -> Sample:
    ask = Ask("", f"\n\n{line.question}", "Answer:")
    prompt, before = ask.ids(tokenizer, line.context), ask.before_question(tokenizer, line.context)
    return Sample(number, prompt, ask.ids(tokenizer), line.answers, before)
