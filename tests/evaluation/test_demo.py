"""The demo on a tiny model: what stands in its table, and what it refuses."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache

import kvprune
from kvprune import KVPruneError
from kvprune.evaluation import demo
from kvprune.evaluation.data.assets import Document
from kvprune.evaluation.data.loading import loaded
from kvprune.evaluation.demo import Configuration, Outcome, run_demo
from kvprune.policies import H2O, AdaKV, Knorm

from ..support.fake_tasks import saved_model
from .test_explain import run

TEXT = "Seven of the nine towers stand on the hill, and two stand in the valley below it. " * 3
ROWS = (
    Configuration("dense"),
    Configuration("all of it", ()),
    Configuration("knorm", (Knorm(0.5),)),
    Configuration("by head", (AdaKV(Knorm(0.25)),)),
    Configuration("by head, quantized", (AdaKV(Knorm(0.25)),), kvprune.Quantized(8, 8)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and its tokenizer, each byte a token."""
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small(folder, monkeypatch) -> Any:
    """The demo with the rows above; returns the outcomes and what was printed."""
    monkeypatch.setattr(demo, "WITHOUT_HEADS", ROWS)

    def run_it(**given: Any) -> tuple[list[Outcome], str]:
        printed = io.StringIO()
        console = Console(width=160, file=printed)
        found = run_demo(console, **{"model": str(folder), **given})
        return found, " ".join(printed.getvalue().split())

    return run_it


def asked(folder: Path, question: str) -> tuple[Any, Any, torch.Tensor]:
    """The model, its tokenizer, and a prompt."""
    tokenizer, model = loaded(str(folder))
    content = TEXT + demo.ASK.format(question=question) + "\n" + demo.LEAD
    return model, tokenizer, torch.tensor([tokenizer.encode(content)])


def test_rows_are_what_generate_gives(folder, small, tmp_path):
    """Answers, bytes and what is kept, for a text of one's own; the dense answers are expected."""
    questions = ["How many towers?", "Where?"]
    found, said = small(text=TEXT, ask=questions, html=tmp_path / "page.html")
    assert [outcome.name for outcome in found] == [row.name for row in ROWS]
    for row, outcome in zip(ROWS, found, strict=True):
        held, as_bfloat16 = [], []
        for number, question in enumerate(questions):
            model, tokenizer, ids = asked(folder, question)
            cache = row.cache(kvprune.attach(model))
            tokens = model.generate(ids, cache=cache, max_new_tokens=24, do_sample=False)
            text = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
            assert outcome.answers[number] == " ".join(text.split())
            if isinstance(cache, DynamicCache):
                held.append(sum(x.keys.nbytes + x.values.nbytes for x in cache.layers))
                as_bfloat16.append(held[-1] / 2)
                continue
            held.append(cache.nbytes)
            columns = [cache.columns(layer)[0] for layer in range(len(cache))]
            slots = sum(
                int((c >= 0).sum()) * model.config.num_key_value_heads // len(c) for c in columns
            )
            saved = 0 if row.store else slots * 2 * model.config.head_dim * 2
            as_bfloat16.append(held[-1] - saved)
            if number == 0:
                assert outcome.kept is not None
                share = sum(float((c < ids.shape[1])[c >= 0].sum()) / len(c) for c in columns)
                assert sum(outcome.kept.layers) == pytest.approx(share, abs=1e-3)
                assert "".join(outcome.kept.tokens).startswith(TEXT[:80])
        assert outcome.held == sum(held) / 2 and outcome.prefill > 0
        assert outcome.as_bfloat16 == sum(as_bfloat16) / 2
        assert outcome.decode is not None and outcome.decode > 0
    dense, whole, knorm, by_head, quantized = found
    assert dense.right == whole.right == (True, True) and whole.answers == dense.answers
    # float32 counts at two bytes a number; a store's bytes are what they are.
    assert dense.as_bfloat16 == dense.held / 2
    assert dense.as_bfloat16 < whole.as_bfloat16 < 1.2 * dense.as_bfloat16
    assert 0.45 < knorm.as_bfloat16 / whole.as_bfloat16 < 0.62
    assert 0.2 < by_head.as_bfloat16 / whole.as_bfloat16 < 0.4
    assert quantized.as_bfloat16 == quantized.held < by_head.held
    # Where nobody sees the table grow, each row is said.
    assert "dense: done, 1 of 5" in said and "by head, quantized: done, 5 of 5" in said
    assert "2 of 2" in said and "as dense" in said and "those of the dense model" in said
    assert "Not with learned heads: SDTP: SDTP(): no heads ship" in said
    page = (tmp_path / "page.html").read_text()
    assert page.count("<span") > len(TEXT) and "https://" not in page


def test_the_document_has_questions_of_its_own(small, monkeypatch, folder):
    """With answers that are expected: they must stand in what is generated."""
    _, _, ids = asked(folder, "How many towers?")
    free, _ = small(text=TEXT, ask=["How many towers?"])
    words = free[0].answers[0]
    document = Document("Towers", TEXT, (("How many towers?", words), ("Where?", "nowhere at all")))
    monkeypatch.setattr(demo, "article_questions", lambda *given: document)
    found, said = small()
    assert found[0].right == (True, False) and "1 of 2" in said
    assert f"{ids.shape[1]} tokens of “Towers” (SQuAD)" in said
    assert "Expected: nowhere at all." in said and "(dense: 1)" in said


def test_the_best_answers_in_the_fewest_bytes_are_shown(small, monkeypatch):
    """Of two that say the same as dense, the smaller."""
    rows = (ROWS[0], ROWS[1], Configuration("nearly all", (H2O(0.9, 0.0999),)), ROWS[4])
    monkeypatch.setattr(demo, "WITHOUT_HEADS", rows)
    found, said = small(text=TEXT, ask=["Where?"])
    best = min(found[1:], key=lambda o: (not o.right[0], o.as_bfloat16))
    assert f"What {best.name} keeps of the first prompt" in said
    assert f"{best.name}: prompts are read in" in said


def test_what_cannot_be_is_refused(folder, tmp_path):
    """Before the model reads anything."""
    for given, match in (
        (["--text", TEXT], "expected a question about the text, got none: add --ask"),
        (["--text", TEXT, "--ask", " "], "expected questions with words, got [' ']"),
        (["--text", "x " * 400, "--ask", "Why?"], "at most the 488 tokens"),
        (["--text", "", "--ask", "Why?"], "expected a text of at least one token"),
        (["--text", TEXT, "--ask", "Why?", "--html", tmp_path / "no" / "page"], "expected"),
        (["--text", TEXT, "--ask", "Why?", "--model", tmp_path], "--model"),
    ):
        error = run("demo", *(["--model", folder] if "--model" not in given else []), *given)
        assert isinstance(error.exception, KVPruneError) and match in str(error.exception)
