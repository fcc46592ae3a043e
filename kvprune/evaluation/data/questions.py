"""Questions about long contexts, from SQuAD and HotpotQA, to train on and to test with.

The three splits of a data set have nothing in common: "train" to train on, "choose" to choose heads
by, and "final" for final figures. SQuAD is split by article, in file order: 0-24 are "train", 25-26
"choose", and 27-34 "final" (without 29, which the demo shows). HotpotQA is split by question: the
last 600 are "final", and the first 300 "choose". A question is left out of "train" or "choose" if
one of its paragraphs is in a later split. Questions with the answer yes or no are left out, because
the context hardly makes these answers more likely.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from .assets import ruler_data

ARTICLES = {"train": range(25), "choose": range(25, 27), "final": (27, 28, *range(30, 35))}
FINAL_QUESTIONS = 600
CHOOSE_QUESTIONS = 300

ASK = (
    "{context}\n\nQuestion: {question}\nAnswer in a few words, with words of the text.",
    "Answer:",
)
"""The text of the user's turn, and the beginning of the answer."""

ASK_OTHERWISE = (
    ASK,
    ("{context}\n\n{question}", "The answer is"),
    ("Read this.\n\n{context}\n\nNow tell me: {question}", "It is"),
    ("Text:\n{context}\n\nBriefly, {question}", "Briefly,"),
    ("{question} Find it in this text.\n\n{context}\n\nAgain: {question}", "Found:"),
)
"""Ways of asking, for training. Figures ask in the first way alone; heads must not rely on it."""


@dataclass(frozen=True)
class Passage:
    """A stretch of a context.

    Attributes:
        text: the text of the stretch.
        supporting: whether the answer needs the stretch; False where that is not known.
    """

    text: str
    supporting: bool = False


@dataclass(frozen=True)
class LongQuestion:
    """A question about a long context.

    Attributes:
        context: the pieces of the context, which follow each other without a gap.
        question: the question.
        answer: the answer.
    """

    context: tuple[Passage, ...]
    question: str
    answer: str

    @property
    def text(self) -> str:
        """The whole context."""
        return "".join(p.text for p in self.context)

    def prompt(self, tokenizer: Any, ask: tuple[str, str] = ASK) -> str:
        """The prompt as a chat: the context with the question, then the beginning of an answer.

        Args:
            tokenizer: has the chat template.
            ask: the text of the user's turn and the beginning of the answer, as `ASK`.
        """
        content = ask[0].format(context=self.text, question=self.question)
        message = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return str(text) + ask[1]

    def encoded(self, tokenizer: Any, ask: tuple[str, str] = ASK) -> tuple[list[int], list[int]]:
        """The token ids of the prompt, and the token ids of the answer."""
        prompt = tokenizer.encode(self.prompt(tokenizer, ask), add_special_tokens=False)
        return prompt, tokenizer.encode(" " + self.answer, add_special_tokens=False)


def squad(
    split: str,
    count: int,
    tokens: tuple[int, int],
    tokenizer: Any,
    seed: int = 0,
    together: int = 1,
) -> list[LongQuestion]:
    """Questions of a split, each with whole consecutive paragraphs of its article as context.

    Args:
        split: "train", "choose" or "final".
        count: the most questions.
        tokens: the fewest and the most tokens of a context. A length between the two is drawn for
            each question; a context is shorter where its article ends.
        tokenizer: counts the tokens.
        seed: the seed of the questions, of the lengths, and of the answer's place in its context.
        together: the most questions about one context.
    """
    draw, found = random.Random(f"squad {split} {seed}"), list[LongQuestion]()
    lengths = _Lengths(tokenizer)
    asked = [q for article in ARTICLES[split] for q in _squad_article(article)]
    draw.shuffle(asked)
    for paragraphs, place, question, answer in asked:
        if len(found) == count:
            break
        most = draw.randint(*tokens)
        if lengths.of(paragraphs[place]) <= most:
            window = _window(paragraphs, place, most, lengths, draw)
            context = (Passage("\n\n".join(window)),)
            found.append(LongQuestion(context, question, answer))
            # Other questions that the same context answers.
            if together > 1:
                others = [(q, a) for ps, i, q, a in asked if ps is paragraphs and ps[i] in window]
                others.remove((question, answer))
                more = draw.sample(others, min(together - 1, len(others), count - len(found)))
                found += [LongQuestion(context, q, a) for q, a in more]
    return found


def hotpotqa(
    split: str,
    count: int,
    tokens: tuple[int, int],
    tokenizer: Any,
    seed: int = 0,
    together: int = 1,
) -> list[LongQuestion]:
    """Questions of a split, with paragraphs that support the answer, and with others.

    Paragraphs that support an answer are there whatever their length. Other paragraphs are drawn
    while there is room. All of them stay in their order, unless several questions share them: then
    the order is drawn. The arguments are those of `squad`; each sentence is a passage.
    """
    draw, lengths = random.Random(f"hotpotqa {split} {seed}"), _Lengths(tokenizer)
    entries = list(_hotpotqa_splits()[split])
    draw.shuffle(entries)
    chosen = entries[:count]
    return [
        question
        for i in range(0, len(chosen), together)
        for question in _hotpotqa_questions(
            chosen[i : i + together], draw.randint(*tokens), lengths, draw
        )
    ]


def hidden_facts(
    split: str,
    count: int,
    tokens: tuple[int, int],
    tokenizer: Any,
    seed: int = 0,
    together: int = 1,
) -> list[LongQuestion]:
    """Questions about facts that no text leads a reader to expect: the code of a made-up person.

    Each fact is a sentence somewhere in a context of SQuAD, and the answer stands in that sentence
    alone. The arguments are those of `squad`; the sentences of the facts come on top of the
    `tokens` of a context.
    """
    draw, found = random.Random(f"facts {split} {seed}"), list[LongQuestion]()
    contexts = squad(split, -(-count // together), tokens, tokenizer, seed)
    for context in contexts:
        people = draw.sample(_PEOPLE, together)
        facts = [(draw.choice(_FACTS), person, _value(draw)) for person in people]
        text = context.text
        for (fact, _), person, value in facts:
            text = _hidden(text, fact.format(person, value), draw)
        passages = (Passage(text),)
        found += [LongQuestion(passages, f[1].format(person), value) for f, person, value in facts]
    return found[:count]


_PEOPLE = tuple(
    f"{first} {last}"
    for first in ("Ada", "Bruno", "Chloe", "David", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jun")
    for last in ("Adler", "Baker", "Costa", "Dufour", "Eriksen", "Fontaine", "Greco", "Haddad")
)
_FACTS = (
    ("The locker of {} opens with {}.", "What does the locker of {} open with?"),
    ("{}'s telephone extension is {}.", "What is the telephone extension of {}?"),
    ("Parcels for {} go to box {}.", "Which box do parcels for {} go to?"),
    ("The password that {} uses is {}.", "What is the password that {} uses?"),
    ("{} lives at house number {}.", "At which house number does {} live?"),
    ("The ticket of {} has the number {}.", "What number does the ticket of {} have?"),
)


def _value(draw: random.Random) -> str:
    """A text of three to nine digits, or of as many letters."""
    signs = draw.choice(("0123456789", "0123456789", "abcdefghijklmnopqrstuvwxyz"))
    return "".join(draw.choices(signs, k=draw.randint(3, 9)))


def _hidden(text: str, sentence: str, draw: random.Random) -> str:
    """The text with a sentence added, behind any of its sentences or at its end."""
    ends = [i + 2 for i in range(len(text) - 1) if text[i : i + 2] == ". "]
    place = draw.choice([*ends, len(text)])
    return f"{text[:place]}{' ' * (place == len(text))}{sentence} {text[place:]}"


class _Lengths:
    """Counts the tokens of paragraphs, and each paragraph only once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}

    def of(self, text: str) -> int:
        """The number of tokens of a paragraph, with the line ends behind it."""
        if text not in self._known:
            encoded = self._tokenizer.encode(text + "\n\n", add_special_tokens=False)
            self._known[text] = len(encoded)
        return self._known[text]


@cache
def _squad_article(number: int) -> list[tuple[list[str], int, str, str]]:
    """The answerable questions of an article.

    Returns:
        for each question all paragraphs, the number of the answering one, the question, the answer.
    """
    entry = ruler_data("squad.json")["data"][number]
    paragraphs = list(dict.fromkeys(p["context"] for p in entry["paragraphs"]))
    return [
        (
            paragraphs,
            paragraphs.index(paragraph["context"]),
            item["question"].strip(),
            item["answers"][0]["text"],
        )
        for paragraph in entry["paragraphs"]
        for item in paragraph["qas"]
        if not item["is_impossible"]
    ]


def _window(
    paragraphs: list[str], place: int, most: int, lengths: _Lengths, draw: random.Random
) -> list[str]:
    """The paragraphs around one; a coin chooses the side of each next one, while there is room."""
    start, stop, used = place, place + 1, lengths.of(paragraphs[place])
    while True:
        room = most - used
        before = start > 0 and lengths.of(paragraphs[start - 1]) <= room
        after = stop < len(paragraphs) and lengths.of(paragraphs[stop]) <= room
        if not before and not after:
            return paragraphs[start:stop]
        if before and (not after or draw.random() < 0.5):
            start -= 1
            used += lengths.of(paragraphs[start])
        else:
            used += lengths.of(paragraphs[stop])
            stop += 1


@cache
def _hotpotqa_splits() -> dict[str, list[dict[str, Any]]]:
    entries = [e for e in ruler_data("hotpotqa.json") if e["answer"] not in ("yes", "no")]
    final = entries[-FINAL_QUESTIONS:]
    choose = list(_apart(entries[:CHOOSE_QUESTIONS], final))
    train = list(_apart(entries[CHOOSE_QUESTIONS:-FINAL_QUESTIONS], final + choose))
    return {"train": train, "choose": choose, "final": final}


def _apart(entries: list[dict[str, Any]], others: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The entries that share no paragraph with the others."""
    taken = {title for entry in others for title, _ in entry["context"]}
    return (e for e in entries if not any(title in taken for title, _ in e["context"]))


def _hotpotqa_questions(
    entries: list[dict[str, Any]], most: int, lengths: _Lengths, draw: random.Random
) -> list[LongQuestion]:
    """The questions of these entries, all on one context of at most `most` tokens if possible."""
    paragraphs = {title: sentences for e in entries for title, sentences in e["context"]}
    needed = {title for e in entries for title, _ in e["supporting_facts"]}
    size = {title: lengths.of("".join([title, "\n", *s])) for title, s in paragraphs.items()}
    taken = {title for title in size if title in needed}
    order = draw.sample(list(size), len(size))
    for title in order:
        if sum(size[t] for t in taken) + size[title] <= most:
            taken.add(title)
    titles = [t for t in (paragraphs if len(entries) == 1 else order) if t in taken]
    return [
        LongQuestion(_passages(e, titles, paragraphs), e["question"].strip(), e["answer"])
        for e in entries
    ]


def _passages(
    entry: dict[str, Any], titles: list[str], paragraphs: dict[str, list[str]]
) -> tuple[Passage, ...]:
    facts = {(title, number) for title, number in entry["supporting_facts"]}
    return tuple(
        Passage(text, (title, number - 1) in facts)
        for title in titles
        for number, text in enumerate(
            [title + "\n", *paragraphs[title][:-1], paragraphs[title][-1] + "\n\n"]
        )
    )
