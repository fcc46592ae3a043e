"""DuoAttention: kept sets, scores of heads, and their files."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.policies import DuoAttention
from kvprune.policies.duoattention import HeadScores, head_scores
from kvprune.storage import layout

from ..support.family_models import attached_family
from ..support.models import LAYERS, fresh_model, left_padded, prompt, tiny_model
from ..support.oracles_by_head import duo_keep

HEADS = {0: [1], 1: [], 2: [0, 1], 3: [0]}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("waste", [0.0, math.inf])
def test_kept_sets_are_the_oracles(waste, monkeypatch):
    """Of padded rows, behind a prompt, in decoding and in a second turn."""
    monkeypatch.setattr(layout, "waste", waste)
    cache, model, mask = ComposedCache([DuoAttention(HEADS, sinks=2, recent=4)]), tiny_model(), None
    held = [[[[] for _ in range(2)] for _ in range(2)] for _ in range(LAYERS)]
    pads, seen = [0, 5], 0
    for count in (14, 1, 1, 6, 1):
        inputs = left_padded(prompt(2, count, seed=seen), pads if seen == 0 else [0, 0])
        new = inputs["attention_mask"]
        mask = new if mask is None else torch.cat([mask, new], 1)
        where = (mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
        model(inputs["input_ids"], attention_mask=mask, position_ids=where, cache=cache)
        for layer in range(LAYERS):
            streaming = [head in HEADS[layer] for head in range(2)]
            columns = cache.columns(layer).expand(-1, 2, -1)
            for row, pad in enumerate(pads):
                number = {c: c - pad for c in range(pad, seen + count)}
                first = max(seen, pad)
                mine = [each + list(range(first, seen + count)) for each in held[layer][row]]
                kept = duo_keep(mine, streaming, 2, 4, number)
                held[layer][row] = kept
                assert [[c for c in head.tolist() if c >= 0] for head in columns[row]] == kept
        seen += count


def test_scores_are_the_attention_beyond_sinks_and_window():
    """Summed up naively, from the probabilities of eager attention."""
    sinks, recent, ids = 3, 5, prompt(1, 24)
    model = kvprune.attach(fresh_model())
    got = head_scores(model, ids, sinks, recent)
    attentions = fresh_model(backend="eager")(ids, output_attentions=True).attentions
    for layer, probabilities in enumerate(attentions):
        for head in range(2):
            total = 0.0
            for query in range(sinks + recent, 24):
                for slot in range(sinks, query - recent + 1):
                    total += float(probabilities[0, 2 * head : 2 * head + 2, query, slot].mean())
            expected = total / (24 - sinks - recent)
            assert float(got.values[layer, head]) == pytest.approx(expected, rel=1e-6)
    assert got.model["num_hidden_layers"] == LAYERS


def test_layers_that_hold_a_state_have_no_heads_that_stream():
    """Numbers are those of the model's layers, and DuoAttention takes the scores."""
    model: Any = attached_family("qwen3_next")
    scores = head_scores(model, prompt(1, 24), 3, 5)
    assert scores.values.isfinite().all(-1).tolist() == [False, True] * 2
    assert sum(len(heads) for heads in scores.streaming(0.5).values()) == 2
    cache = ComposedCache([DuoAttention(scores, share=1.0, sinks=1, recent=2)])
    model(prompt(1, 24), past_key_values=cache, logits_to_keep=1)
    assert [(index, layer.used) for index, layer in cache.slot_layers()] == [(1, 3), (3, 3)]


def test_the_lowest_scores_stream():
    scores = HeadScores(torch.tensor([[0.3, 0.1], [0.1, 0.9]]))
    assert scores.streaming(0.5) == {0: (1,), 1: (0,)}
    assert scores.streaming(0.25) == {0: (1,), 1: ()}
    assert scores.streaming(1.0) == {0: (0, 1), 1: (0, 1)}
    assert scores.streaming(0.0) == {0: (), 1: ()}


def test_files_come_back(tmp_path):
    model = tiny_model()
    scores = head_scores(model, prompt(1, 24), 2, 4)
    scores.save(tmp_path / "heads.safetensors")
    again = HeadScores.load(tmp_path / "heads.safetensors")
    assert torch.equal(again.values, scores.values) and again.model == scores.model
    one = DuoAttention(tmp_path / "heads.safetensors", 0.5, sinks=2, recent=4)
    other = DuoAttention(scores, 0.5, sinks=2, recent=4)
    assert one == other and sum(len(heads) for _, heads in one.heads) == LAYERS
    model(prompt(1, 20), cache=ComposedCache([one]))


def test_published_patterns_are_read(tmp_path):
    """A line for each layer, as the paper's authors publish them."""
    lines = ["0.9\t0.1", "1.0\t0.2", "0.0\t0.3", "0.4\t0.8"]
    (tmp_path / "full_attention_heads.tsv").write_text("\n".join(lines) + "\n")
    for path in (tmp_path, tmp_path / "full_attention_heads.tsv"):
        assert DuoAttention(path, 0.5).heads == ((0, (1,)), (1, (1,)), (2, (0, 1)), (3, ()))


def test_what_is_wrong_is_said(tmp_path):
    for heads in ({0: "x"}, {0: [-1]}, {"a": [0]}, 3, {0: [True]}):
        with pytest.raises(KVPruneError, match="expected a file of scores, or the numbers"):
            DuoAttention(heads)
    with pytest.raises(KVPruneError, match="found none"):
        DuoAttention(tmp_path / "nothing")
    (tmp_path / "full_attention_heads.tsv").write_text("0.1\tx\n")
    with pytest.raises(KVPruneError, match="is another, or damaged"):
        DuoAttention(tmp_path)
    for wrong in ({"share": 1.5}, {"sinks": -1}, {"sinks": 2.0}, {"recent": 0}):
        with pytest.raises(KVPruneError, match=rf"DuoAttention: {next(iter(wrong))}"):
            DuoAttention(HEADS, **wrong)
    with pytest.raises(KVPruneError, match="expected one text of more than 320 tokens"):
        head_scores(tiny_model(), prompt(1, 30))


def test_heads_of_another_model_are_refused():
    """Before anything is read, with what is missing."""
    model = tiny_model()
    for heads, why in (
        ({0: [0]}, r"none of the layers \[1, 2, 3\]"),
        ({**HEADS, 1: [2]}, r"others at \[1\]"),
        ({**HEADS, 4: []}, r"others at \[4\]"),
    ):
        cache = ComposedCache([DuoAttention(heads)])
        with pytest.raises(KVPruneError, match=why):
            model(prompt(1, 20), cache=cache)
        assert cache.seen == 0
    scores = head_scores(tiny_model("qwen3"), prompt(1, 24), 2, 4)
    with pytest.raises(KVPruneError, match=r"were measured on .*qwen3"):
        model(prompt(1, 20), cache=ComposedCache([DuoAttention(scores)]))
    only = ComposedCache([DuoAttention({1: [0]}, sinks=1, recent=2, layers=[1])])
    model(prompt(1, 20), cache=only)
    assert only.columns(0).shape[1:] == (1, 20)
