"""Several questions about one context: one reading, copies of its cache, one score."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

import kvprune
from kvprune import KVPruneError
from kvprune.evaluation.compare import worker
from kvprune.evaluation.compare.plan import Plan, digest_of
from kvprune.evaluation.data.questions import LongQuestion
from kvprune.evaluation.measure.reader import Reading
from kvprune.evaluation.tasks import articles, task
from kvprune.evaluation.tasks.articles import HotpotQA, Squad
from kvprune.evaluation.tasks.unknown import QuestionUnknown

from ..support.fake_tasks import saved_model
from .test_tasks import data, tokenizer

__all__ = ["data"]  # A fixture: small texts in the place of the real ones.

POLICIES = ["streaming(window=12)", "h2o(heavy=6,recent=6)", "kvzip(10)"]
CONTEXTS = ("abc abd abe abf <b a", "bba ab <d cba dd aa ")
ASKED = (("a?", "abc"), ("b?", "d c"), ("dd?", "a"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and a tokenizer."""
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Two contexts, three questions about each, in turns."""
    path = tmp_path / "lines.jsonl"
    lines = [
        {"context": context, "question": question, "answer": answer, "score": "likelihood"}
        for question, answer in ASKED
        for context in CONTEXTS
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def scores(found: Any) -> dict[tuple[str, int], float]:
    """By policy and sample."""
    return {(r.cell.policy, r.sample): r.score for r in found.results.samples}


@pytest.mark.parametrize("executor", ["local", "shared"])
@pytest.mark.parametrize("question", ["known", "unknown"])
def test_a_score_is_the_mean_of_what_each_question_scores_alone(folder, file, question, executor):
    """As if each had a cache of its own; the line without a context too."""
    given: dict[str, Any] = {"tasks": [file], "contexts": [60], "question": question}
    alone = kvprune.compare(str(folder), POLICIES, samples=6, **given)
    found = kvprune.compare(
        str(folder), POLICIES, samples=2, questions=3, executor=executor, **given
    )
    assert not found.failures
    single, several = (
        task(file).with_questions(n).samples(worker_tokenizer(folder), 60, count, 0)
        for n, count in ((1, 6), (3, 2))
    )
    by_prompt = {sample.prompt: sample.number for sample in single}
    mine, each = scores(found), scores(alone)
    assert len({policy for policy, _ in mine}) == 5
    for (policy, number), score in mine.items():
        asked = [by_prompt[one.prompt] for one in several[number].questions]
        assert len(asked) == 3
        assert score == pytest.approx(fmean(each[policy, n] for n in asked), abs=1e-6)


@pytest.mark.parametrize("executor", ["local", "shared"])
def test_a_question_that_comes_twice_is_asked_of_another_cache(folder, tmp_path, executor):
    """Two lines may differ in their answers alone: their prompts are the same."""
    path, lines = tmp_path / "twice.jsonl", []
    for answer in ("abc", "d c"):
        line = {"context": CONTEXTS[0], "question": "a?", "answer": answer, "score": "likelihood"}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    given: dict[str, Any] = {"tasks": [str(path)], "contexts": [60]}
    alone = scores(kvprune.compare(str(folder), POLICIES, samples=2, **given))
    found = kvprune.compare(
        str(folder), POLICIES, samples=1, questions=2, executor=executor, **given
    )
    assert not found.failures
    for (policy, _), score in scores(found).items():
        assert score == pytest.approx(fmean(alone[policy, n] for n in (0, 1)), abs=1e-6)


@pytest.mark.parametrize("question", ["known", "unknown"])
def test_costs_are_those_of_the_first_question(folder, file, question):
    """They equal those of that question alone; the executor changes nothing but seconds."""
    given: dict[str, Any] = {"tasks": [file], "contexts": [60], "question": question}
    local, shared = (
        kvprune.compare(str(folder), POLICIES, samples=2, questions=3, executor=how, **given)
        for how in ("local", "shared")
    )
    one = task(file).with_questions(3).samples(worker_tokenizer(folder), 60, 2, 0)[1]
    alone = kvprune.compare(str(folder), POLICIES, samples=6, **given)
    single = task(file).samples(worker_tokenizer(folder), 60, 6, 0)
    number = next(s.number for s in single if s.prompt == one.prompt)
    costs = [
        {r.cell.policy: replace(r.cost, prefill_seconds=None) for r in found if r.sample == at}
        for found, at in (
            (local.results.samples, 1),
            (shared.results.samples, 1),
            (alone.results.samples, number),
        )
    ]
    assert costs[0] == costs[1]
    for policy, cost in costs[0].items():
        # A question's likelihood is read behind it, which may grow the cache.
        assert replace(cost, bytes_peak=0) == replace(costs[2][policy], bytes_peak=0)


def worker_tokenizer(folder: Path) -> Any:
    """The tokenizer of the model in a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_a_context_is_read_once(folder, file, monkeypatch):
    """If its questions are not known; else each prompt is read by itself."""
    read = list[tuple[int, int]]()

    class Counted(Reading):
        @classmethod
        def of(cls, model, prompt, cache, behind=1):
            read.append((len(prompt), behind))
            return Reading.of(model, prompt, cache, behind)

    monkeypatch.setattr(worker, "Reading", Counted)
    for question, expected in (("unknown", 2), ("known", 6)):
        read.clear()
        kvprune.compare(
            str(folder),
            ["kvzip(10)"],
            tasks=[file],
            contexts=[60],
            samples=2,
            question=question,
            questions=3,
        )
        # Dense, the policy, and without a context, whose prompts are never the same.
        assert len(read) == 2 * expected + 6


@pytest.mark.parametrize("made", [Squad(questions=3), HotpotQA(questions=2)], ids=repr)
def test_questions_of_a_set_share_a_context(made):
    """Their answers are all in it; a sample does not depend on how many are drawn."""
    words = tokenizer("chat")
    found = made.samples(words, 1000, 4, 1)
    assert list(found[:2]) == list(made.samples(words, 1000, 2, 1))
    assert max(len(sample.questions) for sample in found) == made.questions
    for sample in found:
        (text,) = {words.decode(one.prompt[: one.context]) for one in sample.questions}
        asked = {words.decode(one.prompt[one.context :]) for one in sample.questions}
        assert len(asked) == len(sample.questions)
        assert all(one.answers[0] in text for one in sample.questions)
        assert all(len(one.prompt) <= 1000 for one in sample.questions)
    unknown = QuestionUnknown(made).samples(words, 1000, 4, 1)
    for sample, other in zip(found, unknown, strict=True):
        for one, same in zip(sample.questions, other.questions, strict=True):
            assert one.prompt == same.prompt and same.behind == len(one.prompt) - one.context


@pytest.mark.parametrize("made", [Squad(questions=2), HotpotQA(questions=2)], ids=repr)
@pytest.mark.parametrize("size", [420, 700, 1000])
def test_nothing_comes_twice(made, size, monkeypatch):
    """Neither a context of its own nor a question; the intervals would be too narrow."""
    given = list[list[LongQuestion]]()
    kept = articles._apart

    def noted(drawn, most):
        for asked in kept(drawn, most):
            given.append(asked)
            yield asked

    monkeypatch.setattr(articles, "_apart", noted)
    with pytest.raises(KVPruneError, match=r"ask for fewer samples or fewer --questions"):
        made.samples(tokenizer("gpt2"), size, 10**5, 0)
    texts = [asked[0].text for asked in given]
    questions = [question.question for asked in given for question in asked]
    assert len(set(texts)) == len(texts) > 5 and len(set(questions)) == len(questions)
    assert all(len(asked) <= 2 for asked in given)


@pytest.mark.parametrize("made", [Squad(questions=3), HotpotQA(questions=2)], ids=repr)
def test_what_is_put_around_has_none_of_the_answers(made):
    """Each stands in the prompt once."""
    words = tokenizer("gpt2")
    for sample in made.samples(words, 6000, 5, 0):
        text = words.decode(sample.prompt[: sample.context])
        assert [text.count(one.answers[0]) for one in sample.questions] == [1] * (
            1 + len(sample.more)
        )


def test_other_questions_make_another_sample():
    """The ledger tells them apart."""
    words = tokenizer("gpt2")
    several = Squad(questions=3).samples(words, 1000, 1, 0)[0]
    first, shorter = replace(several, more=()), replace(several, more=several.more[:1])
    assert len({digest_of(sample, "x") for sample in (several, first, shorter)}) == 3


def test_tasks_that_ask_one_question_are_refused():
    """And numbers that are none."""
    with pytest.raises(KVPruneError, match=r"needle: --questions 2: .* expected squad"):
        Plan(["h2o"], ["needle"], [100], [], 1, 0, questions=2)
    for bad in (0, 1.5, True):
        with pytest.raises(KVPruneError, match="--questions"):
            Plan(["h2o"], ["squad"], [100], [], 1, 0, questions=bad)  # type: ignore[arg-type]
    both = Plan(["h2o"], ["squad"], [100], [], 1, 0, "both", questions=2).found
    assert [t.name for t in both] == ["squad", "squad, question unknown"]
    again = QuestionUnknown(Squad()).with_questions(2)
    assert again == QuestionUnknown(Squad(questions=2))
