"""Vision-language models: the language model within is attached, with tokens of pictures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.models.releases import cache_name
from kvprune.policies import H2O, TOVA, ExpectedAttention, FastKV, Knorm, SnapKV, StreamingLLM

from ..support.models import LAYERS, prompt
from ..support.picture_models import (
    LENGTH,
    MROPE,
    PICTURES,
    TEXT,
    TOWER,
    attached_picture_model,
    picture_model,
    picture_prompt,
    row_of,
)
from ..support.strategies import sdtp_pruner

PIPELINES: dict[str, list[kvprune.TokenPolicy]] = {
    "dense": [],
    "SnapKV, then H2O": [SnapKV(0.5, window=2, kernel=3), H2O(4, 4)],
    "FastKV, then TOVA": [FastKV(0.6, window=2, kernel=3), TOVA(6)],
    "SDTP, then Knorm": [sdtp_pruner(0.6), Knorm(8, layers=[1, 2, 3])],
    "ExpectedAttention": [ExpectedAttention(8, sinks=2, future=9)],
    "inside": [StreamingLLM(2, 6, positions="cache")],
}
SEVERAL = ("ExpectedAttention", "inside")
"""Pipelines that need one position for each token."""

every_cell = pytest.mark.parametrize(
    ("family", "pipeline"), [(f, p) for f in PICTURES for p in PIPELINES]
)


def said(family: str, pipeline: str, inputs: dict[str, Any], **options: Any) -> Any:
    """The model's answer with a new cache."""
    model, cache = attached_picture_model(family), ComposedCache(PIPELINES[pipeline])
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    return model.generate(**inputs, cache=cache, **options)[:, inputs["input_ids"].shape[1] :]


def refused(family: str, pipeline: str) -> bool:
    """Whether the family cannot do it with pictures; the error must say why, and read nothing."""
    if family not in MROPE or pipeline not in SEVERAL:
        return False
    cache = ComposedCache(PIPELINES[pipeline])
    with pytest.raises(KVPruneError, match=r"several positions each \(mrope\), as in pictures"):
        attached_picture_model(family).generate(**picture_prompt(family, 1), cache=cache)
    assert cache.seen == 0
    return True


@every_cell
def test_rows_beams_and_drafts(family, pipeline):
    """A row in a padded batch says what it says alone; drafts and the batch change no beams."""
    if refused(family, pipeline):
        return
    both = picture_prompt(family, 2, padding=3)
    first, second = row_of(both, 0), row_of(both, 1, padding=3)
    rows = said(family, pipeline, both)
    alone = said(family, pipeline, first)
    assert torch.equal(rows[:1], alone)
    assert torch.equal(rows[1:], said(family, pipeline, second))
    assert torch.equal(said(family, pipeline, first, prompt_lookup_num_tokens=3), alone)
    beams = [said(family, pipeline, each, num_beams=3)[0] for each in (both, first)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("family", PICTURES)
def test_dense_is_stock(family):
    """With a cache of ours, with stock's, before attaching and after detaching."""
    model, inputs = picture_model(family), picture_prompt(family, 2, padding=3)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    stock = model.generate(**inputs, **options)
    tower = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    kvprune.attach(model)
    for cache in (ComposedCache([]), ComposedCache([H2O(500, 500)]), DynamicCache(), None):
        assert torch.equal(model.generate(**inputs, cache=cache, **options), stock)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(**inputs, cache=ComposedCache([]), **options), stock)
    kvprune.detach(model)
    assert torch.equal(model.generate(**inputs, **options), stock)
    after = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    assert after == tower
    # Which is no name of older releases' own.
    with pytest.raises(KVPruneError, match="attach"):
        model(**inputs, **{cache_name(model): ComposedCache([])})


@pytest.mark.parametrize("family", PICTURES)
@torch.no_grad()
def test_a_picture_is_read_once_and_asked_about(family, tmp_path):
    """`kvprune.read` takes pictures; copies and files of the cache go on alike."""
    model, inputs = attached_picture_model(family), picture_prompt(family, 1)
    cache = ComposedCache([SnapKV(10, window=2, kernel=3)])
    logits = kvprune.read(model, cache, **inputs)
    assert [cache.columns(layer).shape[-1] for layer in (1, 3)] == [10, 10]
    whole = said_by(model, inputs)
    assert int(logits.argmax()) == int(whole[0, LENGTH])
    cache.save(tmp_path / "cache")
    loaded = ComposedCache.load(tmp_path / "cache", cache.policies, model)
    ids, answers = torch.cat([inputs["input_ids"], prompt(1, 3)], 1), []
    for held in (copy.deepcopy(cache), loaded, cache):
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
        answers.append(model.generate(ids, cache=held, **options))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def said_by(model: Any, inputs: dict[str, Any]) -> Any:
    """All that a model says with SnapKV."""
    cache = ComposedCache([SnapKV(10, window=2, kernel=3)])
    return model.generate(**inputs, cache=cache, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("family", MROPE)
def test_text_alone_has_one_position_each(family):
    """So all policies run there."""
    model, ids = attached_picture_model(family), prompt(2, 12)
    for pipeline in SEVERAL:
        cache = ComposedCache(PIPELINES[pipeline])
        model.generate(ids, cache=cache, max_new_tokens=4, do_sample=False)
        assert max(cache.columns(layer).shape[-1] for layer in range(LAYERS)) <= 11


def test_other_families_are_refused_by_name():
    """And with what to do instead."""
    config: Any = AutoConfig.for_model(
        "paligemma",
        text_config={"model_type": "gemma", **TEXT},
        vision_config={"model_type": "siglip_vision_model", **TOWER, "projection_dim": 32},
    )
    model = AutoModelForImageTextToText.from_config(config)
    match = "'paligemma'.*only gemma3, llava, qwen2_5_vl, qwen2_vl, smolvlm are known"
    with pytest.raises(KVPruneError, match=match):
        kvprune.attach(model)


@pytest.mark.parametrize("family", PICTURES)
@torch.no_grad()
def test_questions_read_behind_pictures_in_a_padded_batch(family):
    """As when all is read at once; with a mask and without."""
    model, inputs = attached_picture_model(family), picture_prompt(family, 2, padding=3)
    question = prompt(2, 4).clamp(max=50)
    ids = torch.cat([inputs["input_ids"], question], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    options: dict[str, Any] = {"max_new_tokens": 1, "output_logits": True, "do_sample": False}
    kinds = {n: v for n, v in inputs.items() if n.endswith("type_ids")}
    longer = {n: torch.nn.functional.pad(v, (0, 4)) for n, v in kinds.items()}
    everything = {**inputs, **longer, "input_ids": ids, "attention_mask": mask}
    whole = model.generate(
        **everything, cache=ComposedCache([]), return_dict_in_generate=True, **options
    ).logits[0]
    cache = ComposedCache([])
    kvprune.read(model, cache, **inputs)
    logits = kvprune.read(model, cache, question, mask)
    torch.testing.assert_close(logits, whole.to(logits.dtype), rtol=1e-5, atol=1e-6)
    if family in MROPE:
        with pytest.raises(KVPruneError, match="expected them with the first tokens"):
            kvprune.read(model, cache, **{**inputs, "attention_mask": None})


def test_the_language_model_attached_by_itself_too():
    """After the whole model; both go on."""
    model, inputs = kvprune.attach(picture_model("gemma3")), picture_prompt("gemma3", 1)
    kvprune.attach(model.model.language_model)
    cache = ComposedCache([H2O(4, 4)])
    model.generate(**inputs, cache=cache, max_new_tokens=3, do_sample=False)
    assert cache.columns(1).shape[-1] == 8
