"""What the tests of bad input share: caches in use, and what must hold after a refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvprune import ComposedCache, KVPruneError, TokenPolicy
from kvprune.policies import H2O, SDTP

from ..support.models import (
    prompt,
    tiny_model,
)
from ..support.strategies import sdtp_heads

NAN, INF = float("nan"), float("inf")

NAN, INF = float("nan"), float("inf")
LENGTH = 10
"""Tokens that a filled cache has seen."""


def h2o(**options: Any) -> H2O:
    """Evicts half of the prompt, by shares, so that the prompt's length shows; observes."""
    return H2O(heavy=0.2, recent=0.3, **options)


def pruner(**options: Any) -> SDTP:
    """Prunes before layers 1 and 3, in forwards of four tokens or more."""
    return SDTP(**{"heads": sdtp_heads(), "keep": 0.6, "min_tokens": 4, **options})


def filled(*policies: TokenPolicy, rows: int = 1) -> ComposedCache:
    """A cache of `tiny_model` that has read a prompt."""
    cache = ComposedCache(policies)
    tiny_model()(prompt(rows, LENGTH), past_key_values=cache)
    return cache


def held(cache: ComposedCache) -> tuple[Any, ...]:
    """What a user can read off a cache."""
    layers = [cache.columns(i).tolist() for i in range(len(cache))] if cache.is_initialized else []
    return cache.seen, cache.get_seq_length(), cache.batch_size, layers


def follow(model: Any, cache: ComposedCache) -> list[Tensor]:
    """Logits of more tokens: several at once, one alone, and generated ones."""
    rows, size = max(cache.batch_size, 1), model.config.vocab_size
    ids = prompt(rows, 8, seed=7) % size
    logits = [model(part, past_key_values=cache).logits for part in (ids[:, :4], ids[:, 4:5])]
    mask = torch.ones(rows, cache.seen + 3, dtype=torch.long)
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids[:, 5:], attention_mask=mask, past_key_values=cache, **options)
    return [*logits, *out.logits, out.sequences]


def assert_same_future(cache: ComposedCache, twin: ComposedCache, model: Any = None) -> None:
    """Both go on with the very same numbers, and end up with the same columns."""
    model = model or tiny_model()
    got, expected = follow(model, cache), follow(model, twin)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert held(cache) == held(twin)


def assert_refused(
    cache: ComposedCache, match: str, *calls: Callable[[], Any], model: Any = None
) -> None:
    """The calls are refused, again and again, and the cache goes on as an untouched twin."""
    before, twin = held(cache), copy.deepcopy(cache)
    for call in 2 * calls:
        with pytest.raises(KVPruneError, match=match):
            call()
        assert held(cache) == before
    assert_same_future(cache, twin, model)


def assert_unusable(cache: ComposedCache, match: str) -> None:
    """Nothing but `reset()` is possible, and the error says so; nothing has been counted."""
    model: Any = tiny_model()
    more, seen = prompt(2, 2 * LENGTH), cache.seen
    calls: list[Callable[[], Any]] = [
        lambda: model(more, past_key_values=cache),
        lambda: model(more[:, :1], past_key_values=cache),
        lambda: model.generate(more, cache=cache, max_new_tokens=2),
        lambda: cache.crop(0),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
    ]
    for call in calls:
        with pytest.raises(KVPruneError, match=match):
            call()
        assert cache.seen == seen
