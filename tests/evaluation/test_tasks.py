"""Tasks: length, determinism, what is in a prompt, and how an answer is judged."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvprune import KVPruneError
from kvprune.evaluation.data import questions
from kvprune.evaluation.tasks import TASKS, articles, kv, task, texts
from kvprune.evaluation.tasks import words as words_task
from kvprune.evaluation.tasks.base import Sample
from kvprune.evaluation.tasks.needles import MultiNeedle
from kvprune.evaluation.tasks.perplexity import Perplexity
from kvprune.evaluation.tasks.prompts import most, opening
from kvprune.evaluation.tasks.scoring import recall
from kvprune.evaluation.tasks.tracking import Tracking
from kvprune.evaluation.tasks.words import Words

RECALLED = ("needle", "multi-needle", "tracking", "words", "kv")
ASKED = ("squad", "hotpotqa")
KINDS = ("gpt2", "bos", "chat")
TEMPLATE = (
    "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


_DRAW = random.Random(0)
MADE_UP = [
    "".join(_DRAW.choices("abcdefghijklmnopqrst", k=_DRAW.randint(2, 9))) for _ in range(900)
]


def text_of(words: int, seed: int) -> str:
    """Sentences of made-up words."""
    draw = random.Random(seed)
    return " ".join(draw.choice(MADE_UP) + "." * (draw.random() < 0.1) for _ in range(words))


def article(number: int) -> dict[str, Any]:
    """Ten paragraphs, each with its own question and answer."""
    return {
        "title": f"Article_{number}",
        "paragraphs": [
            {
                "context": f"{text_of(40, 1000 * number + i)} key{number}x{i} ends",
                "qas": [
                    {
                        "is_impossible": False,
                        "question": f"which key is {i} in article {number}{' please' * i}?",
                        "answers": [{"text": f"key{number}x{i}"}],
                    }
                ],
            }
            for i in range(10)
        ],
    }


def entry(number: int) -> dict[str, Any]:
    """Four paragraphs, of which two are needed; the last has the answer of another entry."""
    titles = [f"title {number} {i}" for i in range(4)]
    said = [text_of(12, number), f" {text_of(12, 5000 + number)} answer{number} ends."]
    return {
        "answer": f"answer{number}",
        "question": f"what is {number}?",
        "supporting_facts": [[titles[0], 0], [titles[2], 1]],
        "context": [
            [titles[0], [text_of(30, 9 * number)]],
            [titles[1], [text_of(30, 9 * number + 1)]],
            [titles[2], said],
            [titles[3], [f"answer{number - 1} stands here too."]],
        ],
    }


CACHED = (
    texts.essays,
    texts.essay_words,
    texts.vocabulary,
    texts._starts,
    questions._squad_article,
    questions._hotpotqa_splits,
    articles._final,
)


@pytest.fixture(autouse=True, scope="module")
def data():
    """Small texts in the place of the real ones."""
    found = {
        "PaulGrahamEssays.json": {"text": text_of(30_000, 0)},
        "squad.json": {"data": [article(n) for n in range(35)]},
        "hotpotqa.json": [entry(n) for n in range(150)],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "ruler_data", found.__getitem__)
        patch.setattr(questions, "ruler_data", found.__getitem__)
        patch.setattr(questions, "FINAL_QUESTIONS", 60)
        patch.setattr(questions, "CHOOSE_QUESTIONS", 21)
        for cached in CACHED:
            cached.cache_clear()
        yield
    for cached in CACHED:
        cached.cache_clear()


@cache
def tokenizer(kind: str) -> Any:
    """Byte-level BPE with a few merges: as it is, with a bos, or with a chat template as well."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([text_of(500, 1)], trainer)
    if kind != "gpt2":
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    if kind == "chat":
        fast.chat_template = TEMPLATE
    return fast


@dataclass
class Right:
    """Answers as it should, token by token."""

    sample: Sample
    tokens: Any
    scored: Any = None

    def generate(self, tokens: int) -> str:
        """All answers, as far as they go."""
        text = " " + ", ".join(self.sample.answers)
        return self.tokens.decode(self.tokens.encode(text, add_special_tokens=False)[:tokens])

    def log_likelihood(self, text: str | Sequence[int]) -> list[float]:
        """A little less at every token."""
        self.scored = text
        return [-float(i) for i in range(len(text))]


class Silent:
    """Says nothing."""

    def generate(self, tokens: int) -> str:
        """Nothing."""
        return ""

    def log_likelihood(self, text: str | Sequence[int]) -> list[float]:
        """Is not asked."""
        raise AssertionError


def decoded(ids: Sequence[int], kind: str) -> str:
    """As a text."""
    return str(tokenizer(kind).decode(list(ids)))


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=6)
@given(st.sampled_from(KINDS), st.integers(800, 1600), st.integers(0, 99))
def test_prompts_are_as_long_as_the_context_and_deterministic(name, kind, context, seed):
    """Never longer; shorter by 3 % at most where the text is made up; the first whatever count."""
    made = task(name).samples(tokenizer(kind), context, 3, seed)
    lengths = [len(sample.prompt) for sample in made]
    assert max(lengths) <= context
    assert min(lengths) >= context * (0.97 if name not in ASKED else 0.5)
    assert [sample.number for sample in made] == [0, 1, 2]
    assert list(task(name).samples(tokenizer(kind), context, 2, seed)) == list(made[:2])
    assert len({sample.prompt for sample in made}) == 3
    other = task(name).samples(tokenizer(kind), context, 3, seed + 1)
    assert [sample.prompt for sample in other] != [sample.prompt for sample in made]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*RECALLED, *ASKED])
@settings(max_examples=3)
@given(st.integers(900, 1400), st.integers(0, 99))
def test_the_answer_is_in_the_prompt_and_not_in_the_bare_one(name, kind, context, seed):
    """And the bare prompt is a small part of it, which ends in the same way."""
    for sample in task(name).samples(tokenizer(kind), context, 2, seed):
        prompt, bare = decoded(sample.prompt, kind), decoded(sample.bare, kind)
        assert all(answer in prompt and answer not in bare for answer in sample.answers)
        assert len(sample.bare) < context
        assert sample.prompt[-20:] == sample.bare[-20:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RECALLED)
def test_what_is_found_counts(name, kind):
    """All of it 1, none of it 0, in the tokens that are asked for."""
    asked = task(name)
    for sample in asked.samples(tokenizer(kind), 1000, 5, 0):
        score = asked.score(sample, Right(sample, tokenizer(kind)))
        assert score.value == 1 and sample.answers[0] in score.answer
        assert asked.score(sample, Silent()).value == 0


def test_a_part_of_the_answers_is_a_part_of_the_score():
    """In any case, but not inside a longer word or number."""
    reader = Right(Sample(0, (), (), ("Alpha 1234567 beta",)), tokenizer("gpt2"))
    for answers, value in [
        (("1234567", "7654321"), 0.5),
        (("ALPHA", "beta", "1234567", "bet"), 0.75),
        (("234567", "123456"), 0),
    ]:
        assert recall(Sample(0, (), (), answers), reader, 99).value == value
    chinese = Right(Sample(0, (), (), ("答案是北京的",)), tokenizer("gpt2"))
    assert recall(Sample(0, (), (), ("北京",)), chinese, 99).value == 1


@pytest.mark.parametrize("name", ASKED)
def test_questions_are_scored_by_the_gold_answer(name):
    """With a space before it, by the mean over its tokens."""
    (sample,) = task(name).samples(tokenizer("chat"), 900, 1, 0)
    reader = Right(sample, tokenizer("chat"))
    score = task(name).score(sample, reader)
    assert reader.scored == f" {sample.answers[0]}"
    assert score.value == -(len(reader.scored) - 1) / 2


@pytest.mark.parametrize("name", ASKED)
def test_questions_come_with_their_paragraphs_and_others(name):
    """What is put around them does not have the answer, and never parts them."""
    made = task(name).samples(tokenizer("gpt2"), 6000, 30, 0)
    for sample in made:
        prompt = decoded(sample.prompt, "gpt2")
        assert prompt.count(sample.answers[0]) == 1
        assert len(sample.prompt) > 5500
        if name == "hotpotqa":
            number = sample.answers[0].removeprefix("answer")
            places = [prompt.index(f"title {number} {i}") for i in range(4)]
            assert places == sorted(places)


class Measures:
    """Notes how many tokens are to follow the prompt."""

    def __init__(self, tokens: Any) -> None:
        self.tokens, self.asked = tokens, 0

    def generate(self, tokens: int) -> str:
        """As many as are asked for."""
        self.asked = tokens
        return ""

    def log_likelihood(self, text: str | Sequence[int]) -> list[float]:
        """Of all tokens of a text."""
        given = isinstance(text, str)
        ids = self.tokens.encode(text, add_special_tokens=False) if given else text
        self.asked = len(ids)
        return [0.0] * len(ids)


@pytest.mark.parametrize("name", [*TASKS, "recall", "likelihood"])
def test_a_task_says_how_much_may_follow(name, tmp_path):
    """Just what it asks of a reader, one's own lines included."""
    line = {"context": "c", "question": "q", "answer": "an answer of some length", "score": name}
    (tmp_path / "own.jsonl").write_text(json.dumps(line))
    asked = task(name if name in TASKS else str(tmp_path / "own.jsonl"))
    (sample,) = asked.samples(tokenizer("gpt2"), 800, 1, 0)
    reader = Measures(tokenizer("gpt2"))
    asked.score(sample, reader)
    assert reader.asked == asked.following(sample, tokenizer("gpt2")) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_of_what_follows(kind):
    """By stretch; the prompt and it are one text, and the bare prompt is the last of it."""
    (sample,) = Perplexity().samples(tokenizer(kind), 500, 1, 0)
    reader = Right(sample, tokenizer(kind))
    score = Perplexity().score(sample, reader)
    assert len(reader.scored) == 128
    assert list(score.parts) == ["tokens 1-32", "tokens 33-64", "tokens 65-96", "tokens 97-128"]
    assert list(score.parts.values()) == [-15.5, -47.5, -79.5, -111.5]
    assert score.value == -63.5
    first = opening(tokenizer(kind))
    assert len(first) == (kind != "gpt2") and sample.prompt[: len(first)] == first
    assert sample.bare == (*first, *sample.prompt[-32:])
    whole = decoded([*sample.prompt[len(first) :], *reader.scored], kind)
    assert whole in texts.essays()


def test_a_tokenizer_s_template_is_used_where_it_has_one():
    """And its bos, once, where it has none."""
    begins = {
        kind: decoded(task("needle").samples(tokenizer(kind), 400, 1, 0)[0].prompt, kind)
        for kind in KINDS
    }
    assert begins["gpt2"].startswith("Some special")
    assert begins["bos"].startswith("<s>Some special")
    assert begins["chat"].startswith("<s>[user]Some special")
    assert "?[assistant]The special" in begins["chat"] and "?\nThe special" in begins["bos"]
    assert all(text.endswith("is:") and text.count("<s>") <= 1 for text in begins.values())


@pytest.mark.parametrize("name", TASKS)
def test_a_context_that_is_too_short_is_refused(name):
    """With the least that works, which does."""
    with pytest.raises(KVPruneError, match=name) as refused:
        task(name).samples(tokenizer("chat"), 20, 3, 0)
    if name in ASKED:
        assert "expected 3 samples that fit into 20 tokens, and there are 0" in str(refused.value)
        return
    # Other contexts draw other samples, of a few tokens more or less.
    least = int(str(refused.value).split("at least ")[1].split()[0]) + 20
    made = task(name).samples(tokenizer("chat"), least, 3, 0)
    texts_ = [(decoded(s.prompt, "chat"), s.answers) for s in made]
    assert all(a in text for text, answers in texts_ for a in answers) or name == "perplexity"


def test_more_questions_than_there_are_are_refused():
    """With how many there are."""
    with pytest.raises(KVPruneError, match=r"hotpotqa: expected 999 .* there are 60;"):
        task("hotpotqa").samples(tokenizer("gpt2"), 1200, 999, 0)
    assert len(task("hotpotqa").samples(tokenizer("gpt2"), 1200, 40, 0)) == 40


def test_perplexity_needs_a_text_that_is_long_enough():
    """Rather than to go round."""
    with pytest.raises(KVPruneError, match="essays can fill"):
        Perplexity().samples(tokenizer("gpt2"), 500_000, 1, 0)


def test_tasks_that_cannot_be_are_refused():
    """Their parameters, before any sample."""
    for make in (
        lambda: MultiNeedle(keys=1, queries=2),
        lambda: MultiNeedle(values=0),
        lambda: Tracking(hops=0),
        lambda: Words(common=0),
        lambda: Words(share=1.0),
    ):
        with pytest.raises(KVPruneError, match="expected"):
            make()


def test_parameters_say_how_much_is_to_be_found():
    """Keys, values, queries; hops; common words."""
    chat = tokenizer("chat")
    (several,) = MultiNeedle(keys=3, values=2, queries=2).samples(chat, 1500, 1, 0)
    assert len(several.answers) == 4
    text = decoded(several.prompt, "chat")
    assert text.count("One of the special magic numbers for") == 6
    for chain in Tracking(hops=3).samples(chat, 1500, 6, 0):
        text = decoded(chain.prompt, "chat")
        links = [f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(chain.answers)]
        places = [text.index(link) for link in links]
        assert places == sorted(places) and len(places) == 3
    (words,) = Words(common=2, share=0.5).samples(chat, 1500, 1, 0)
    said = decoded(words.prompt, "chat").split()
    first, second = (said.count(word) for word in words.answers)
    assert first == second and first > 5
    assert max(said.count(w) for w in texts.vocabulary() if w not in words.answers) <= 2


def test_pairs_are_json_whose_keys_differ():
    """Also where there are more of them than words; the value is that of the key asked for."""
    few = texts.vocabulary()[:20]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "vocabulary", lambda: few)
        made = task("kv").samples(tokenizer("gpt2"), 1500, 3, 0)
    for sample in made:
        text = decoded(sample.prompt, "gpt2")
        pairs = json.loads(text[text.index("{") : text.index("}") + 1], object_pairs_hook=list)
        assert len({key for key, _ in pairs}) == len(pairs) > 40
        assert dict(pairs)[text.split('Key: "')[1].split('"')[0]] == sample.answers[0]


def test_a_common_word_is_none_that_the_question_says():
    """Or it would be found without the list."""
    few = ("list", "often", "most", "above", "zebra", "appear")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words_task, "vocabulary", lambda: few)
        made = task("words").samples(tokenizer("gpt2"), 500, 9, 0)
    assert {sample.answers for sample in made} == {("zebra",)}


def test_depths_are_all_over_the_text():
    """Of the needle, and of the pair."""
    for name in ("needle", "kv"):
        made = task(name).samples(tokenizer("gpt2"), 1500, 40, 0)
        prompts = [(decoded(s.prompt, "gpt2"), s.answers[0]) for s in made]
        depths = sorted(text.index(answer) / len(text) for text, answer in prompts)
        assert depths[3] < 0.25 and depths[-4] > 0.7 and 0.3 < depths[20] < 0.7


@given(st.integers(0, 9), st.integers(0, 500), st.integers(1, 9), st.integers(0, 3))
def test_the_most_that_fits(least, room, grain, wobble):
    """It does and one more does not, also where lengths waver."""
    length = lambda n: 7 + grain * n + (n * n) % (wobble + 1)  # noqa: E731
    limit = length(least) + room
    found = most(length, least, limit)
    assert length(found) <= limit < length(found + 1) and found >= least


def test_names_are_known_or_refused():
    """With the one that was meant."""
    assert [task(name).name for name in TASKS] == list(TASKS)
    with pytest.raises(KVPruneError, match=r"needle, .* got 'nedle'; did you mean 'needle'"):
        task("nedle")
    with pytest.raises(KVPruneError, match=r"got 'zzz'$"):
        task("zzz")
    with pytest.raises(KVPruneError, match=r"no/such.jsonl: expected a file"):
        task("no/such.jsonl")
