"""SDTP against a dense model in which dropped tokens are masked out from their stage on."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune.policies import H2O, SDTP, SDTPHeads

from ..support.masked_dense import MaskedDense
from ..support.models import LAYERS, left_padded, plain_model, positions, prompt, tiny_model
from ..support.strategies import chunked, sdtp_heads

FAMILIES = ["llama", "qwen3", "mistral", "mistral-window", "gpt_neox"]
WINDOW = 12


def pruner(keep: float = 0.6, asking: int = 0, **options) -> SDTP:
    """Two stages, before layers 1 and 3; with `asking` newest tokens in a low-rank term."""
    heads = sdtp_heads(
        query_heads=2 * bool(asking), query_size=3, query_tokens=asking or 1, window=5
    )
    return SDTP(heads, keep, **{"min_tokens": 6, **options})


def forward(model, cache, ids, mask, asked=1):
    """One forward of new tokens; logits `[B, asked, V]`."""
    everything = torch.cat([cache.mask, mask], 1) if hasattr(cache, "mask") else mask
    cache.mask = everything
    with torch.no_grad():
        return model(
            ids,
            attention_mask=everything,
            position_ids=positions(everything)[:, -ids.shape[1] :],
            past_key_values=cache,
            logits_to_keep=asked,
        ).logits


def check_forwards(family, policy, steps, padding, asked=1, seed=0):
    """Runs the same forwards through both; kept sets and asked logits must agree."""
    model, dense = tiny_model(family), MaskedDense(plain_model(family), policy)
    cache, ids, start = kvprune.ComposedCache([policy]), prompt(2, sum(steps), seed), 0
    mask = left_padded(ids, padding)["attention_mask"]
    for count in steps:
        new = slice(start, start + count)
        got = forward(model, cache, ids[:, new], mask[:, new], min(asked, count))
        expected = dense.forward(ids[:, new], mask[:, new], min(asked, count))
        valid = mask[:, new][:, -min(asked, count) :].bool()
        expected = expected[:, -min(asked, count) :]
        torch.testing.assert_close(got[valid], expected[valid], rtol=1e-9, atol=1e-10)
        for layer in range(LAYERS):
            for row in range(2):
                columns = cache.columns(layer)[row, 0]
                alive = dense.columns(layer, row)
                # Sliding layers hold what the next query can see.
                sight = 0 if family != "mistral-window" else start + count - WINDOW + 1
                assert columns[columns >= 0].tolist() == [c for c in alive if c >= sight]
        start += count
    return cache, dense


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_the_masked_dense_model(family):
    """Batch of 2 with left padding, in float64, and 20 decode steps."""
    cache, _ = check_forwards(family, pruner(), [40] + [1] * 20, [0, 9], asked=3)
    counts = [cache.columns(layer).shape[-1] for layer in range(LAYERS)]
    assert counts == ([WINDOW - 1] * 4 if family == "mistral-window" else [60, 44, 44, 34])


@given(
    st.sampled_from(FAMILIES),
    st.sampled_from([0.3, 0.55, 0.9]),
    st.data(),
    st.sampled_from([0, 3, 0.1, 0.5]),
    st.integers(0, 5),
    st.integers(1, 4),
)
def test_any_forwards_equal_the_masked_dense_model(family, keep, data, local, sinks, asked):
    """The prompt in any chunks (each pruned by itself), any padding, any protection."""
    length = data.draw(st.integers(2, 36))
    padding = [0, data.draw(st.integers(0, length - 1))]
    policy = pruner(keep, data.draw(st.sampled_from([0, 1, 7])), local=local, sinks=sinks)
    steps = [*data.draw(chunked(length)), 1, 1, 7, 1]
    check_forwards(family, policy, steps, padding, asked, seed=data.draw(st.integers(0, 9)))


@pytest.mark.parametrize("kind", ["last", "list", "negative", "mask"])
def test_tokens_whose_logits_are_asked_for_stay(kind):
    """An int, an index tensor, a bool mask; their logits are those of full depth."""
    model, ids = tiny_model(), prompt(1, 40)
    wanted = {"last": [39], "list": [3, 17, 39], "negative": [20, 38], "mask": [5, 6]}[kind]
    asked = {
        "last": 1,
        "list": torch.tensor([3, 17, 39]),
        "negative": torch.tensor([-20, -2]),
        "mask": torch.zeros(1, 40, dtype=torch.bool).index_fill(1, torch.tensor([5, 6]), True),
    }[kind]
    cache = kvprune.ComposedCache([pruner(0.2, sinks=0, local=0)])
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=asked)
    assert set(wanted) <= set(cache.columns(LAYERS - 1)[0, 0].tolist())


def test_a_thread_that_is_refused_takes_back_nothing_of_what_another_asked_for():
    """Between the two hooks of a forward, on one cache."""
    model, ids, kept = tiny_model(), prompt(1, 40), []
    for disturbed in (False, True):
        cache = kvprune.ComposedCache([pruner(0.3)])
        cache.bind(model.model._kvprune, model.model)
        cache.ask_logits(9)
        if disturbed:
            other = threading.Thread(target=cache.ask_logits, args=(None,))
            other.start()
            other.join()
        with torch.no_grad():
            model.model(ids, past_key_values=cache)
        kept.append([cache.columns(layer).tolist() for layer in range(LAYERS)])
    assert kept[0] == kept[1]
    assert set(range(31, 40)) <= set(kept[0][-1][0][0])


def test_unset_logits_to_keep_protects_the_last_token_alone():
    """What stays is what `logits_to_keep=1` keeps."""
    model, ids, kept = tiny_model(), prompt(1, 40), []
    for options in ({}, {"logits_to_keep": 0}, {"logits_to_keep": 1}):
        cache = kvprune.ComposedCache([pruner(0.2, sinks=0, local=0)])
        with torch.no_grad():
            output = model(ids, past_key_values=cache, **options)
        assert output.logits.shape[1] == (1 if options.get("logits_to_keep") else 40)
        kept.append(cache.columns(LAYERS - 1)[0, 0].tolist())
    assert kept[0] == kept[1] == kept[2]
    assert 39 in kept[0] and len(kept[0]) == 2  # 0.2 ** 2 of 40, rounded


def test_short_rows_are_left_alone_whatever_the_other_rows_do():
    """`min_tokens` is a matter of the row, so that rows do not depend on each other."""
    cache = kvprune.ComposedCache([pruner(0.5, min_tokens=20)])
    inputs = left_padded(prompt(2, 40), [0, 25])
    forward(tiny_model(), cache, inputs["input_ids"], inputs["attention_mask"])
    kept = (cache.columns(LAYERS - 1) >= 0).sum(-1).flatten().tolist()
    assert kept == [10, 15]


def test_default_stages_are_as_many_as_fit():
    """Layers 4, 7, ..., 28 of 30: nine stages."""
    assert SDTPHeads(32, 30).layers == (4, 7, 10, 13, 16, 19, 22, 25, 28)
    assert SDTPHeads(32, 30, stages=5).layers == (4, 7, 10, 13, 16)


def test_heads_are_saved_and_loaded(tmp_path):
    """Weights, configuration and dtype come back."""
    heads = sdtp_heads(query_heads=2).half()
    heads.save_pretrained(tmp_path)
    again = SDTPHeads.from_pretrained(tmp_path)
    assert again.configuration == heads.configuration
    for name, tensor in heads.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert again.state_dict()[name].dtype == torch.float16
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}


def test_pruned_prompt_and_eviction_together():
    """H2O sees what SDTP left; each layer holds at most its budget."""
    model, cache = tiny_model(), kvprune.ComposedCache([pruner(0.5), H2O(4, 4)])
    model.generate(**left_padded(prompt(2, 40), [0, 9]), max_new_tokens=10, cache=cache)
    assert [cache.columns(i).shape[-1] for i in range(LAYERS)] == [8] * LAYERS
    assert cache.seen == 49


def test_a_dropped_token_keeps_the_state_with_which_it_left():
    """The output has full length; who left before a layer shows what came to that layer."""
    policy = pruner(0.5)
    model, cache = tiny_model(), kvprune.ComposedCache([policy])
    inputs = left_padded(prompt(2, 30), [0, 7])
    dense = MaskedDense(plain_model(), policy)
    dense.forward(inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad():
        where = positions(inputs["attention_mask"])
        got = model.model(**inputs, position_ids=where, past_key_values=cache).last_hidden_state
        states = {layer: plain_model().model.norm(dense.entered[layer]) for layer in (1, 3)}
    assert got.shape == (2, 30, 32)
    for row in range(2):
        before = set(dense.columns(0, row))
        for layer, expected in states.items():
            left = sorted(before - set(dense.columns(layer, row)))
            before -= set(left)
            assert len(left) >= 5
            torch.testing.assert_close(got[row, left], expected[row, left], rtol=1e-9, atol=1e-10)
