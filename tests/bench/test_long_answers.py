"""docs/long-answers.md says what was measured; answers are given or said, and counted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kvprune
from bench import long_answers
from bench.held import as_bfloat16
from bench.long_answers import Text
from kvprune.policies import H2O, AdaKV, SnapKV

from ..evaluation.test_explain import bytes_tokenizer
from ..support.models import fresh_model, prompt

WORDS = ["abel", "baker", "coma", "dart", "easy", "fork", "gold", "hero", "iron", "jazz"]


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch):
    """A few words in the place of those of the essays."""
    monkeypatch.setattr(long_answers, "vocabulary", lambda: WORDS)


@pytest.fixture
def tokenizer() -> Any:
    """Each byte is a token; the first one is padding."""
    found = bytes_tokenizer()
    found.pad_token = found.convert_ids_to_tokens(0)
    return found


def test_the_page_says_what_the_results_say():
    """And its picture, of all methods."""
    found = json.loads(long_answers.RESULTS.read_text())["rows"]
    said = "run python -m bench.long_answers --page"
    assert long_answers.PAGE.read_text() == long_answers.page(found), said
    assert long_answers.PAGE.with_suffix(".svg").read_text() == long_answers.picture(found), said
    assert {row["method"] for row in found} == set(long_answers.METHODS)


def test_a_list_is_to_be_retold(tokenizer):
    """All of it stands in the prompt; the answer begins behind the lines that are given."""
    text = Text(tokenizer, 0, tokens=90)
    prompt, answer = tokenizer.decode(text.prompt), tokenizer.decode(text.answer)
    assert len(text.answer) == 90 and answer.startswith("\n".join(text.lines))
    assert all(prompt.count(f"{line}\n") == 1 for line in text.lines)
    assert text.right(answer) == 1 and text.right("") == 0
    assert text.right("x\n" + text.lines[0]) == 1 / len(text.lines)
    assert Text(tokenizer, 1, tokens=90).prompt != text.prompt
    with pytest.raises(kvprune.KVPruneError, match="expected 90 tokens, got 50"):
        long_answers.Text(Short(), 0, tokens=90)


class Short:
    """A tokenizer that finds fifty tokens in whatever it reads."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Fifty."""
        return [1] * 50


@pytest.mark.parametrize("policies", [[], [H2O(6, 6)]], ids=repr)
def test_answers_are_given_and_their_likelihood_noted(policies, tokenizer):
    """As if each text were read alone, token by token; bytes are those of a text at the end."""
    model: Any = kvprune.attach(fresh_model(vocab_size=len(tokenizer)))
    texts = [Text(tokenizer, number, tokens=90) for number in (0, 3)]
    texts[1].prompt = texts[1].prompt[5:]
    cache = kvprune.ComposedCache(policies)
    found = long_answers.answered(model, tokenizer, texts, "forced", cache)
    for row, text in enumerate(texts):
        alone, nats, first = kvprune.ComposedCache(policies), [], []
        ids = torch.tensor([text.prompt])
        with torch.no_grad():
            for token in text.answer:
                logits = model(ids, past_key_values=alone).logits[0, -1].float()
                nats.append(float(logits.log_softmax(-1)[token]))
                first.append(int(logits.argmax()) == token)
                ids = torch.tensor([[token]])
        assert found["nats"][row] == pytest.approx(sum(nats) / 90, abs=1e-6)
        assert found["right"][row] == sum(first) / 90
    assert [at for at, _ in found["held"]] == [0, 64, 90]
    assert found["held"][-1][1] == as_bfloat16(model, cache) / 2
    assert found["columns"] == pytest.approx(sum(len(t.prompt) for t in texts) / 2 + 90)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policies", [[], [H2O(6, 6)], [AdaKV(SnapKV(12, window=2))]], ids=repr)
def test_keys_and_values_count_at_two_bytes_a_number(policies, dtype):
    """Room for more tokens as well; all else counts as it is."""
    model: Any = kvprune.attach(fresh_model(dtype=dtype))
    cache = kvprune.ComposedCache(policies)
    with torch.no_grad():
        model(prompt(2, 40), past_key_values=cache)
        model(prompt(2, 1), past_key_values=cache)
    parts = [part for _, layer in cache.slot_layers() for part in layer.rectangles]
    numbers = sum(t.untyped_storage().nbytes() for p in parts for t in p.held.tensors())
    numbers //= dtype.itemsize
    rest = cache.nbytes - numbers * dtype.itemsize
    assert rest > 0 and as_bfloat16(model, cache) == pytest.approx(2 * numbers + rest)
    stored = kvprune.ComposedCache(policies, store=kvprune.Quantized(8, 8))
    with torch.no_grad():
        model(prompt(2, 40), past_key_values=stored)
    assert as_bfloat16(model, stored) == stored.nbytes


def test_a_model_says_what_it_likes(tokenizer):
    """`generate` alone says the same; lines that are right are counted."""
    model: Any = kvprune.attach(fresh_model(vocab_size=len(tokenizer)))
    texts = [Text(tokenizer, number, tokens=90) for number in (0, 3)]
    found = long_answers.answered(model, tokenizer, texts, "free", kvprune.ComposedCache())
    assert found["right"] == [0, 0] and "nats" not in found
    said = model.generate(torch.tensor([texts[0].prompt]), max_new_tokens=90, do_sample=False)
    new = tokenizer.decode(said[0, len(texts[0].prompt) :])
    texts[0].lines = [*new.split("\n"), "another"]
    found = long_answers.answered(model, tokenizer, texts, "free", kvprune.ComposedCache())
    assert found["right"][0] == pytest.approx(1 - 1 / len(texts[0].lines))


def test_a_run_goes_on_where_it_was(tmp_path: Path, tokenizer, monkeypatch):
    """What a file has is not measured again; losses are paired with dense."""
    asked = list[str]()

    def answered(model, tokenizer, texts, mode, cache):
        asked.append(mode)
        nats = [-1.0 - len(cache.policies)] * len(texts)
        forced = {"nats": nats} if mode == "forced" else {}
        return {"right": [0.5] * len(texts), "held": [[0, 10], [9, 384]], "columns": 2.0} | forced

    monkeypatch.setattr(long_answers, "answered", answered)
    args = argparse.Namespace(work=tmp_path / "a" / "work.jsonl", methods=["dense", "H2O"])
    args.first, args.texts, args.tokens = 0, 2, 90
    model = fresh_model()
    for _ in range(2):
        long_answers.measured(model, tokenizer, args)
    assert asked == ["forced", "forced", "free", "free"]
    found = long_answers.rows(model, long_answers.lines(args.work))
    assert [row.get("lost") for row in found] == [0, 1, None, None]
    whole = long_answers.dense_bytes(model, 2.0)
    assert all(row["bytes"] == 384 / whole for row in found)
    text = long_answers.table(found)
    assert "| H2O | " in text and " | 1.00 (1.00 to 1.00) | 0.50 (0.50 to 0.50) |" in text
