"""Questions about long contexts: the splits share nothing, and the answer is in the context."""

from __future__ import annotations

import itertools

import pytest

from kvprune.evaluation.data import questions
from kvprune.evaluation.data.questions import ASK, ASK_OTHERWISE, hidden_facts, hotpotqa, squad


class Words:
    """A tokenizer whose tokens are words and line ends."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [hash(w) for w in text.replace("\n", " . ").split()]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return f"<user>{messages[0]['content']}<assistant>"


def article(number: int) -> dict:
    """Eight paragraphs, each with a question that it alone answers, and one that none does."""
    return {
        "title": f"Article_{number}",
        "paragraphs": [
            {
                "context": f"a{number}p{place} says that " + "word " * 6 + f"key{number}-{place}",
                "qas": [
                    {
                        "is_impossible": impossible,
                        "question": f" which key has a{number}p{place}? ",
                        "answers": [] if impossible else [{"text": f"key{number}-{place}"}],
                    }
                    for impossible in (False, True)
                ],
            }
            for place in range(8)
        ],
    }


def entry(number: int) -> dict:
    """Four paragraphs, of which one is in the entry after it too; facts in two."""
    titles = [f"t{number}-{i}" for i in range(3)] + [f"shared{number // 2}"]
    return {
        "answer": "yes" if number % 7 == 0 else f"answer{number}",
        "question": f" what is {number}? ",
        "supporting_facts": [[titles[0], 1], [titles[2], 0]],
        "context": [[t, [f"{t} one.", f" {t} two.", " three."]] for t in titles],
    }


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """Small data sets in the place of the real ones, with fewer final questions."""
    found = {
        "squad.json": {"data": [article(n) for n in range(35)]},
        "hotpotqa.json": [entry(n) for n in range(200)],
    }
    monkeypatch.setattr(questions, "ruler_data", found.__getitem__)
    monkeypatch.setattr(questions, "FINAL_QUESTIONS", 31)
    monkeypatch.setattr(questions, "CHOOSE_QUESTIONS", 21)
    for cached in (questions._squad_article, questions._hotpotqa_splits):
        cached.cache_clear()
    yield
    for cached in (questions._squad_article, questions._hotpotqa_splits):
        cached.cache_clear()


def text(question) -> str:
    return "".join(p.text for p in question.context)


@pytest.mark.parametrize("make", [squad, hotpotqa])
def test_splits_share_no_paragraph(make):
    """Whatever of them is asked for; and all splits have some."""
    seen: dict[str, set[str]] = {}
    for split in ("train", "choose", "final"):
        found = make(split, 1000, (60, 90), Words())
        assert len(found) > 5
        seen[split] = {line for q in found for line in text(q).split("\n") if line}
    assert not seen["train"] & seen["choose"]
    assert not (seen["train"] | seen["choose"]) & seen["final"]


def test_squad_contexts_are_consecutive_paragraphs_that_hold_the_answer():
    """Of the number of tokens that was asked for."""
    for question in squad("final", 30, (35, 60), Words(), seed=3):
        context = text(question)
        assert question.answer in context and question.question.startswith("which")
        places = [int(p[p.index("p") + 1 :].split()[0]) for p in context.split("\n\n")]
        assert places == list(range(places[0], places[0] + len(places)))
        assert len(Words().encode(context, False)) <= 60


def test_hotpotqa_contexts_hold_all_that_supports_the_answer():
    """In the order of the data set, with each supporting sentence marked, and no yes or no."""
    for question in hotpotqa("final", 30, (10, 40), Words()):
        number = int(question.answer.removeprefix("answer"))
        marked = [p.text.strip() for p in question.context if p.supporting]
        assert marked == [f"t{number}-0 two.", f"t{number}-2 one."]
        titles = [t for t in text(question).split("\n") if t and " " not in t]
        order = [t for t, _ in entry(number)["context"]]
        assert titles == [t for t in order if t in titles]


def test_the_same_seed_gives_the_same_questions():
    """And another one others."""
    for make in (squad, hotpotqa):
        one, same, other = (make("train", 9, (40, 80), Words(), seed=s) for s in (0, 0, 1))
        assert one == same and one != other


def test_every_way_of_asking_has_context_question_and_lead():
    """The lead ends the prompt, and the answer follows with a space."""
    (question,) = squad("train", 1, (40, 80), Words())
    assert ASK in ASK_OTHERWISE and len(set(ASK_OTHERWISE)) == len(ASK_OTHERWISE)
    for ask in ASK_OTHERWISE:
        prompt = question.prompt(Words(), ask)
        assert text(question) in prompt and question.question in prompt
        assert prompt.endswith(f"<assistant>{ask[1]}")
        assert question.encoded(Words(), ask)[1] == Words().encode(question.answer, False)


def test_several_questions_about_one_context():
    """Other ones, whose paragraphs are in it too; one by one it is as without."""
    alone = squad("choose", 8, (60, 90), Words())
    found = squad("choose", 1000, (60, 90), Words(), together=3)
    assert squad("choose", 8, (60, 90), Words(), together=1) == alone
    assert squad("choose", 4, (60, 90), Words(), together=3) == found[:4]
    groups = [list(g) for _, g in itertools.groupby(found, key=lambda q: id(q.context))]
    assert max(len(g) for g in groups) == 3 and len(groups) > 5
    for group in groups:
        assert len({q.question for q in group}) == len(group)
        assert all(q.answer in text(q) and q.context is group[0].context for q in group)


def test_hotpotqa_questions_about_one_context():
    """It holds what supports each of them, marked for each; one by one it is as without."""
    alone = hotpotqa("final", 9, (40, 80), Words())
    assert hotpotqa("final", 9, (40, 80), Words(), together=1) == alone
    found = hotpotqa("train", 8, (40, 80), Words(), together=3)
    groups = [list(g) for _, g in itertools.groupby(found, key=text)]
    assert [len(g) for g in groups] == [3, 3, 2]
    for question in found:
        number = int(question.answer.removeprefix("answer"))
        marked = {p.text.strip() for p in question.context if p.supporting}
        assert marked == {f"t{number}-0 two.", f"t{number}-2 one."}
        assert len({p.text for p in question.context if p.text.startswith("t")}) > 4
    # Beside these nothing fits; in a roomier one there are others, of any of the questions.
    (roomy, *_) = hotpotqa("train", 3, (500, 500), Words(), together=3)
    assert len([t for t in text(roomy).split("\n") if t and " " not in t]) in range(9, 13)


def test_hidden_facts_are_in_a_context_of_squad():
    """Each question's answer is there, beside whom it is about; the rest is the article's."""
    found = hidden_facts("train", 10, (60, 90), Words(), together=4)
    groups = [list(g) for _, g in itertools.groupby(found, key=text)]
    assert [len(g) for g in groups] == [4, 4, 2] and len({q.answer for q in found}) == 10
    articles = squad("train", 3, (60, 90), Words())
    for group, article in zip(groups, articles, strict=True):
        context = text(group[0])
        for question in group:
            assert context.count(question.answer) == 1
            person = next(p for p in questions._PEOPLE if p in question.question)
            assert context.count(person) == 1
        words = iter(context.split())
        assert all(word in words for word in text(article).split())
