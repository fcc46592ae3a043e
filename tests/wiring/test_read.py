"""kvprune.read: a prefix in a cache, with all done that policies do at the end of a prompt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.policies import H2O, TOVA, SnapKV
from kvprune.testing.models import fresh_model

from ..support.family_models import attached_family
from ..support.models import LAYERS, left_padded, plain_model, prompt, tiny_model
from ..support.strategies import sdtp_pruner

PIPELINES: dict[str, list[kvprune.TokenPolicy]] = {
    "dense": [],
    "snapkv": [SnapKV(0.5, window=3)],
    "sdtp, then h2o": [sdtp_pruner(0.6), H2O(0.2, 0.2)],
}


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("chunk", [None, 7, 99])
@torch.no_grad()
def test_generate_goes_on_behind_it(pipeline, chunk):
    """With the logits' token, it says what it says of a prompt that it reads itself."""
    model, inputs = tiny_model(), left_padded(prompt(2, 20), [0, 6])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    policies = PIPELINES[pipeline]
    pieces = {} if chunk is None else {"prefill_chunk_size": chunk}
    whole = model.generate(**inputs, cache=ComposedCache(policies), **options, **pieces)
    cache = ComposedCache(policies)
    logits = kvprune.read(model, cache, **inputs, chunk=chunk)
    assert cache.seen == 20 and logits.shape == (2, model.config.vocab_size)
    first = logits.argmax(-1, keepdim=True)
    assert torch.equal(first, whole[:, 20:21])
    ids = torch.cat([inputs["input_ids"], first], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    options["max_new_tokens"] = 5
    said = model.generate(ids, attention_mask=mask, cache=cache, **options)
    assert torch.equal(said, whole)


@torch.no_grad()
def test_it_is_one_prompt_whatever_the_chunks():
    """Policies are asked at its end alone, and shares are of all of it; so in a second turn."""
    model, ids = tiny_model(), prompt(1, 60)
    kept = []
    for chunk in (None, 1, 11):
        cache = ComposedCache([SnapKV(0.5, window=4, kernel=1)])
        kvprune.read(model, cache, ids[:, :40], chunk=chunk)
        assert [cache.columns(i).shape[-1] for i in range(LAYERS)] == [20] * LAYERS
        kvprune.read(model, cache, ids[:, 40:], chunk=chunk)
        kept.append([cache.columns(i).tolist() for i in range(LAYERS)])
        assert [cache.columns(i).shape[-1] for i in range(LAYERS)] == [30] * LAYERS
    assert kept[0] == kept[1] == kept[2]


@torch.no_grad()
def test_a_single_token_is_a_prompt():
    """Unlike one in a loop of one's own."""
    cache = ComposedCache([TOVA(1, when="prompt")])
    kvprune.read(tiny_model(), cache, prompt(1, 1))
    assert cache.state.prompts == 1


@torch.no_grad()
def test_many_questions_about_one_document():
    """Copies of the cache, each with a question behind the document."""
    model, document = tiny_model(), prompt(1, 40)
    cache = ComposedCache([SnapKV(12, window=4)])
    kvprune.read(model, cache, document)
    for seed in (1, 2):
        ids = torch.cat([document, prompt(1, 5, seed)], 1)
        mine = copy.deepcopy(cache)
        said = model.generate(ids, cache=mine, max_new_tokens=4, do_sample=False)
        assert said.shape == (1, 49) and mine.seen == 48 and cache.seen == 40


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "gemma3_text", "deepseek_v3"])
@torch.no_grad()
def test_logits_are_the_model_s_own(family):
    """Of each row's last token, beside padding."""
    model: Any = attached_family(family)
    inputs = left_padded(prompt(2, 14), [0, 5])
    logits = kvprune.read(model, ComposedCache([]), **inputs, chunk=6)
    alone = kvprune.read(model, ComposedCache([]), inputs["input_ids"][1:, 5:])
    torch.testing.assert_close(logits[1:], alone, rtol=1e-4, atol=1e-5)


IDS = prompt(2, 8)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"input_ids": IDS[0]}, r"expected input_ids \[B, n\] of at least one token, got \(8,\)"),
        ({"input_ids": IDS[:, :0]}, "of at least one token"),
        ({"input_ids": [[1, 2]]}, "of at least one token, got list"),
        ({"input_ids": IDS, "chunk": 0}, "chunk=0: expected a number of tokens, at least 1"),
        ({"input_ids": IDS, "chunk": 2.0}, "chunk=2.0: expected"),
        ({"input_ids": IDS, "chunk": True}, "chunk=True: expected"),
        ({"input_ids": IDS, "chunk": 4, "pixel_values": IDS}, "chunk=4 with pixel_values"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :5] * 0 + 1}, r"attention_mask \[2, 8\]"),
        ({"input_ids": IDS, "attention_mask": (IDS * 0 + 1).tril(6)}, r"those of rows \[0\]"),
    ],
)
def test_what_cannot_be_read(arguments, match):
    """Refused before anything is read; the cache goes on."""
    cache = ComposedCache([H2O(4, 4)])
    with pytest.raises(KVPruneError, match=match):
        kvprune.read(tiny_model(), cache, **arguments)
    assert cache.seen == 0
    kvprune.read(tiny_model(), cache, IDS)


def test_models_and_caches_that_are_none_of_ours():
    """Named; a model without a head gives no logits."""
    cache: Any = ComposedCache([])
    with pytest.raises(KVPruneError, match=r"read: .*call kvprune.attach\(model\) first"):
        kvprune.read(plain_model(), cache, IDS)
    base = kvprune.attach(fresh_model()).model
    with pytest.raises(KVPruneError, match="gives no logits of tokens"):
        kvprune.read(base, cache, IDS)
    nothing: Any = None
    with pytest.raises(KVPruneError, match="expected a ComposedCache, got NoneType"):
        kvprune.read(tiny_model(), nothing, IDS)
    with cache.prompt(8):
        with pytest.raises(KVPruneError, match="reads nothing else"):
            kvprune.read(tiny_model(), cache, IDS)
        tiny_model()(IDS, past_key_values=cache)


@pytest.mark.parametrize("more", [{}, {"output_hidden_states": True}, {"return_dict": False}])
@torch.no_grad()
def test_padded_rows_have_the_positions_that_generate_counts(more):
    """Whatever else the forward is handed."""
    if "return_dict" in more:
        with pytest.raises(KVPruneError, match="return_dict: expected none"):
            kvprune.read(tiny_model(), ComposedCache([]), IDS, **more)
        return
    model, inputs = tiny_model(), left_padded(prompt(2, 20), [0, 6])
    cache = ComposedCache([])
    logits = kvprune.read(model, cache, **inputs, **more)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    whole = model.generate(**inputs, **options)
    ids = torch.cat([inputs["input_ids"], logits.argmax(-1, keepdim=True)], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    options["max_new_tokens"] = 7
    assert torch.equal(model.generate(ids, attention_mask=mask, cache=cache, **options), whole)
