"""A user's own JSON lines: what is asked, how it is scored, and what is refused with its line."""

from __future__ import annotations

import json

import pytest

from kvprune import KVPruneError
from kvprune.evaluation.tasks import task

from .test_tasks import Right, Silent, decoded, tokenizer

GOOD = {"context": "The key is {context} blue.", "question": "Which key?", "answer": "blue"}


def written(tmp_path, *lines) -> str:
    """A file of these, each a text or what is written as JSON."""
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return str(path)


def test_lines_are_asked_as_they_stand(tmp_path):
    """The context, the question and where the answer begins; bare without the context."""
    asked = task(written(tmp_path, GOOD, "", {**GOOD, "context": "other", "id": 7}))
    assert asked.name == str(tmp_path / "mine.jsonl") and asked.unit == "recall"
    made = asked.samples(tokenizer("gpt2"), 200, 2, 0)
    prompts = {decoded(s.prompt, "gpt2") for s in made}
    assert prompts == {f"{c}\n\nWhich key?\nAnswer:" for c in (GOOD["context"], "other")}
    assert {decoded(s.bare, "gpt2") for s in made} == {"\n\nWhich key?\nAnswer:"}
    assert all(s.answers == ("blue",) for s in made)
    assert asked.score(made[0], Right(made[0], tokenizer("gpt2"))).value == 1
    assert asked.score(made[0], Silent()).value == 0


def test_a_file_may_begin_with_a_mark(tmp_path):
    """As some editors write UTF-8."""
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert len(task(str(path)).samples(tokenizer("gpt2"), 200, 1, 0)) == 1


def test_the_seed_chooses_the_lines(tmp_path):
    """The same ones whatever the count and the context."""
    asked = task(written(tmp_path, *({**GOOD, "context": f"c{i}"} for i in range(50))))
    made = asked.samples(tokenizer("gpt2"), 200, 20, 3)
    assert made[:5] == asked.samples(tokenizer("gpt2"), 300, 5, 3)
    assert made[:5] != asked.samples(tokenizer("gpt2"), 200, 5, 4)
    assert len({s.prompt for s in made}) == 20


def test_a_list_is_found_in_parts(tmp_path):
    """Each answer of it counts alike, and there is room to say them all."""
    line = {**GOOD, "answer": ["blue", *(f"answer{i}" for i in range(30))]}
    asked = task(written(tmp_path, line))
    (sample,) = asked.samples(tokenizer("gpt2"), 200, 1, 0)
    assert asked.score(sample, Right(sample, tokenizer("gpt2"))).value == 1


def test_a_file_may_be_scored_by_likelihood(tmp_path):
    """If a line says so."""
    asked = task(written(tmp_path, GOOD, {**GOOD, "score": "likelihood"}))
    assert asked.unit == "nats a token"
    sample = asked.samples(tokenizer("gpt2"), 200, 1, 0)[0]
    reader = Right(sample, tokenizer("gpt2"))
    assert asked.score(sample, reader).value == -2 and reader.scored == " blue"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'context': 1}", "line 3: expected JSON"),
        ([1], "line 3: expected a JSON object, got list"),
        ({"context": "c", "question": "q"}, "line 3: .* as 'answer', got null"),
        ({**GOOD, "context": 3}, "line 3: expected a text as 'context', got 3"),
        ({**GOOD, "question": " "}, "line 3: expected a text as 'question'"),
        ({**GOOD, "answer": []}, r"line 3: .* as 'answer', got \[\]"),
        ({**GOOD, "answer": ["a", 2]}, "line 3: .* as 'answer', got 2"),
        ({**GOOD, "context": "a\ud800b"}, "line 3: expected a text as 'context'"),
        ({**GOOD, "score": "f1"}, "line 3: expected recall or likelihood as 'score', got \"f1\""),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line, said):
    """Blank lines count."""
    with pytest.raises(KVPruneError, match=said):
        task(written(tmp_path, GOOD, "", line))


def test_files_that_cannot_be_are_refused(tmp_path):
    """Empty, no text, two ways of scoring, several answers to be likely."""
    with pytest.raises(KVPruneError, match="at least one line"):
        task(written(tmp_path, "", " "))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(KVPruneError, match="in UTF-8"):
        task(str(tmp_path / "bytes.jsonl"))
    ways = [{**GOOD, "score": "recall"}, GOOD, {**GOOD, "score": "likelihood"}]
    with pytest.raises(KVPruneError, match="line 3: expected 'recall', as before,"):
        task(written(tmp_path, *ways))
    several = [{**GOOD, "score": "likelihood"}, {**GOOD, "answer": ["a", "b"]}]
    with pytest.raises(KVPruneError, match="line 2: expected one answer"):
        task(written(tmp_path, *several))


def test_too_few_lines_and_too_long_ones_are_refused(tmp_path):
    """With how many there are, and which one is too long, and the least that works."""
    asked = task(written(tmp_path, GOOD, {**GOOD, "context": "long " * 100}))
    with pytest.raises(KVPruneError, match=r"expected 3 samples .* there are 2"):
        asked.samples(tokenizer("gpt2"), 5000, 3, 0)
    with pytest.raises(KVPruneError, match="line 2: expected a prompt of at most 100") as refused:
        asked.samples(tokenizer("gpt2"), 100, 2, 0)
    least = int(str(refused.value).split("got ")[1].split(";")[0])
    assert len(asked.samples(tokenizer("gpt2"), least, 2, 0)) == 2
    with pytest.raises(KVPruneError, match="line 2"):
        asked.samples(tokenizer("gpt2"), least - 1, 2, 0)
