"""What code written for `DynamicCache` asks of a cache: the same answers, or the same errors.

Where an answer differs by nature, it stands in `BY_NATURE`, with the reason.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import kvprune
from kvprune.policies import H2O

from ..support.models import prompt, tiny_model

LENGTH = 10
KEYS = (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))

# Of any cache, also before its first forward. Every expression is tried on a cache of its own.
ALWAYS = [
    "c.get_seq_length()",
    "c.get_seq_length(3)",
    "c.get_seq_length(99)",
    "c.get_seq_length(layer_idx=1)",
    "c.get_max_length(0)",
    "c.get_max_length(99)",
    "c.get_max_cache_shape()",
    "c.get_query_offset()",
    "c.get_query_offset(1)",
    "c.get_usable_length(1)",
    "c.is_compileable",
    "c.is_initialized",
    "c.max_batch_size",
    "c.max_cache_len",
    "c.seen_tokens",
    "c._seen_tokens",
    "c.key_cache",
    "c.value_cache",
    "c.to('cpu')",
    "c.to_legacy_cache()",
    "type(c).from_legacy_cache((KEYS,))",
    "c[0]",
    "c['keys']",
    "c.nonsense",
    "c.offloading",
    "c.layers[99]",
    "0 in c",
    "c.has_previous_state()",
    "c.has_previous_state(99)",
    "c.early_initialization(2, [2], 8, torch.float64, 'cpu')",
    "c.activate_past_recording()",
    "c.crop(0)",
    "c.reset()",
    "c.reset() or c.get_seq_length()",
    "c.reset() or c.is_initialized",
    "copy.deepcopy(c).get_seq_length()",
    "copy.copy(c).get_seq_length()",
    "isinstance(c, transformers.Cache)",
    "c == c, c == copy.deepcopy(c), hash(c) == hash(c)",
    "c.reorder_cache(torch.tensor([1, 0]))",
    "c.batch_repeat_interleave(2)",
    "[len(item) for item in c][:0]",
]

# Once it has read something.
FILLED = [
    "len(c)",
    "bool(c)",
    "len(c.layers)",
    "c.is_sliding",
    "c.is_linear",
    "c.get_max_length()",
    "c.has_previous_state(0)",
    "c.update_conv_state(torch.ones(1), 0)",
    "c.update_recurrent_state(torch.ones(1), 0)",
    "c.update_indexer(torch.ones(1), 0)",
    "c.offload(0)",
    "c.offload(0, only_non_sliding=False)",
    "c.offload(99)",
    "c.prefetch(0)",
    "c.early_initialization(2, 2, 8, torch.float64, 'cpu')",
    "len(list(c))",
    "[len(item) for item in c]",
    "[(k.shape[:2], v.shape[3], window) for k, v, window in c]",
    "c.layers[0].get_seq_length()",
    "c.layers[-1].get_seq_length()",
    "c.layers[0].get_max_length()",
    "c.layers[0].get_mask_sizes(3)",
    "c.layers[0].device",
    "c.layers[0].keys.dtype",
    "c.layers[0].is_initialized",
    "c.layers[0].is_compileable",
    "c.layers[0].is_sliding",
    "c.layers[0].sliding_window",
    "c.layers[0].record_past",
    "c.layers[0].cumulative_length",
    "c.layers[0].max_cache_len",
    "c.layers[0].max_batch_size",
    "c.layers[0].batch_size",
    "c.layers[0].offload()",
    "c.layers[0].prefetch()",
    "c.layers[0].offload() or c.layers[0].prefetch() or c.layers[0].get_seq_length()",
    "c.layers[0].nonsense",
    "c.reorder_cache(torch.tensor([1, 0])) or c.layers[0].get_seq_length()",
    "c.batch_select_indices(torch.tensor([True, False])) or c.layers[1].values.shape[0]",
]

# Once it has read something, and nothing was evicted.
WHOLE = [
    "c.layers[0].keys",
    "c.layers[0].values",
    "c.layers[0].keys.shape",
    "c.layers[3].values[1, 0, :, 2]",
    "list(c)",
    "next(iter(c))[0].shape",
    "c.reorder_cache(torch.tensor([1, 0])) or c.layers[0].keys",
    "c.batch_repeat_interleave(2) or c.layers[1].values",
    "c.batch_select_indices(torch.tensor([1])) or c.layers[1].values",
    "c.batch_select_indices(torch.tensor([True, False])) or c.layers[1].keys.shape",
]

# Where nothing evicts, whatever the budget.
DENSE = ["c.crop(-1)", "c.crop(-1) or c.get_seq_length()", "c.crop(-2) or list(c)"]
DENSE += ["c.crop(-1) or c.layers[0].get_seq_length()", "c.crop(1)"]

BY_NATURE = {
    "bool(c)": "before the first forward a cache with policies is not 'no cache'",
    "c.batch_size": "the rows are known; DynamicCache says -1",
    "c.is_croppable": "what was evicted cannot come back",
    "c.layers[0].supports_early_init": "a layer learns of its heads from its first tokens",
    "c.get_mask_sizes(1, 0)": "only for a forward of an attached model",
    "c.layers[0].crop(-1)": "rows and padding are the cache's: c.crop(-1)",
    "c.layers[0].reorder_cache(torch.tensor([1, 0]))": "the same, and so for all that changes one",
    "c.update(*2 * [torch.ones(2, 2, 1, 8).double()], 0)": "only in one",
}


def filled(cache: Any) -> Any:
    """After a prompt of two rows."""
    with torch.no_grad():
        tiny_model()(prompt(2, LENGTH), past_key_values=cache)
    return cache


def dynamic() -> DynamicCache:
    return filled(DynamicCache(config=tiny_model().config))


CACHES = {
    "dense": list,
    "roomy": lambda: [H2O(500, 500)],
    "evicted": lambda: [H2O(2, 2)],
}


def answer(expression: str, cache: Any) -> Any:
    """What an expression gives, or the error that it raises."""
    names = {"c": cache, "copy": copy, "torch": torch, "transformers": transformers, "KEYS": KEYS}
    try:
        return eval(expression, names)
    except Exception as error:
        return error


def same(got: Any, expected: Any) -> bool:
    """Equal, with tensors as attention block by block rounds; or an error that is one of these."""
    if isinstance(expected, Exception):
        return isinstance(got, type(expected))
    if isinstance(expected, torch.Tensor):
        close = isinstance(got, torch.Tensor) and got.shape == expected.shape
        return close and torch.allclose(got, expected, rtol=1e-10, atol=1e-11)
    if isinstance(expected, (list, tuple)):
        pairs = type(got) is type(expected) and len(got) == len(expected)
        return pairs and all(map(same, got, expected))
    return type(got) is type(expected) and bool(got == expected)


@pytest.mark.parametrize("expression", ALWAYS)
def test_before_the_first_forward(expression):
    """As one of the two that DynamicCache then is: without layers, or with empty ones."""
    got = answer(expression, kvprune.ComposedCache([H2O(2, 2)]))
    either = DynamicCache(), DynamicCache(config=tiny_model().config)
    expected = [answer(expression, cache) for cache in either]
    assert any(same(got, one) for one in expected), (got, expected)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("expression", ALWAYS + FILLED)
def test_once_something_was_read(expression, name):
    """Whatever was evicted."""
    got = answer(expression, filled(kvprune.ComposedCache(CACHES[name]())))
    expected = answer(expression, dynamic())
    assert same(got, expected), (got, expected)


@pytest.mark.parametrize("name", ["dense", "roomy"])
@pytest.mark.parametrize("expression", WHOLE)
def test_where_nothing_was_evicted(expression, name):
    """Keys and values too, in the order of the text."""
    got = answer(expression, filled(kvprune.ComposedCache(CACHES[name]())))
    assert same(got, answer(expression, dynamic()))


@pytest.mark.parametrize("expression", DENSE)
def test_where_nothing_evicts(expression):
    """Tokens can be taken back."""
    got = answer(expression, filled(kvprune.ComposedCache([])))
    expected = answer(expression, dynamic())
    assert same(got, expected), (got, expected)


@pytest.mark.parametrize("expression", BY_NATURE)
def test_what_differs_by_nature(expression):
    """It does; a difference that is gone is to be taken from the list."""
    make = (
        kvprune.ComposedCache if "bool" in expression else lambda: filled(kvprune.ComposedCache())
    )
    other = DynamicCache if "bool" in expression else dynamic
    assert not same(answer(expression, make()), answer(expression, other()))


@pytest.mark.skipif(
    "dtype" not in vars(dynamic().layers[0]), reason="this release's layers have no dtype"
)
def test_dtype():
    """Of releases before 5.24, which ask for it."""
    layer = filled(kvprune.ComposedCache([])).layers[0]
    assert layer.dtype == dynamic().layers[0].dtype == torch.float64


def test_what_a_layer_knows_of_the_length_follows_everything(tmp_path):
    """Steps, pruning of hidden states, taking back, copies and files."""
    cache = filled(kvprune.ComposedCache([]))
    model, ids = tiny_model(), prompt(2, 3)

    def lengths(cache: Any) -> set[int]:
        return {cache.seen, *(layer.get_seq_length() for layer in cache.layers)}

    with torch.no_grad():
        model(ids, past_key_values=cache)
        assert lengths(cache) == {LENGTH + 3}
        cache.crop(-2)
        assert lengths(cache) == lengths(copy.deepcopy(cache)) == {LENGTH + 1}
        cache.save(tmp_path / "cache")
        loaded = kvprune.ComposedCache.load(tmp_path / "cache", [], model)
        assert lengths(loaded) == {LENGTH + 1}
        drafts = kvprune.ComposedCache([H2O(2, 2)])
        model(ids, past_key_values=drafts)
        drafts.activate_past_recording()
        model(ids, past_key_values=drafts)
        assert lengths(drafts) == {6}
        drafts.crop(-2)
        assert lengths(drafts) == {4}


def test_a_sliding_window_is_told():
    """As the third of what iteration gives, for layers that have one."""
    model = tiny_model("mistral-window")
    caches = kvprune.ComposedCache([]), DynamicCache(config=model.config)
    for cache in caches:
        with torch.no_grad():
            model(prompt(2, LENGTH), past_key_values=cache)
    assert same([item[2] for item in caches[0]], [item[2] for item in caches[1]])
