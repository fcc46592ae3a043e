"""The candidates that are compared: policies at a budget, and the dense model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

import kvprune
from kvprune.policies import (
    H2O,
    SDTP,
    TOVA,
    ExpectedAttention,
    FastKV,
    KeyDiff,
    Knorm,
    ObservedAttention,
    PyramidKV,
    SDTPHeads,
    SnapKV,
    StreamingLLM,
)

DENSE, STREAMING, HEAVY, PRUNED, BOTH = "dense", "StreamingLLM", "H2O", "SDTP", "SDTP + H2O"
NAMES = (DENSE, STREAMING, HEAVY, PRUNED, BOTH)
STREAMING_INSIDE, HEAVY_INSIDE = f'{STREAMING}(positions="cache")', f'{HEAVY}(positions="cache")'

ROUND = 64
SELDOM = f", every {ROUND} tokens"
"""The steps from one eviction to the next, and how names of candidates end that evict so."""

FASTKV = "FastKV"
FIELD = (SnapKV, TOVA, PyramidKV, KeyDiff, Knorm, ObservedAttention, ExpectedAttention)
"""Methods of the field that have one budget; FastKV prunes."""

LEFT = 0.35
"""The share of a prompt's tokens that SDTP lets into the last layers."""

Make = Callable[[], Cache]


def policies(model: Any, budget: int) -> dict[str, list[kvprune.TokenPolicy]]:
    """The policies of each candidate, by name; `budget` slots stay in each layer.

    SDTP alone has no budget, and evicts nothing.
    """
    sdtp = random_sdtp(model)
    h2o = H2O(heavy=budget // 2, recent=budget - budget // 2)
    return {
        STREAMING: [StreamingLLM(sinks=4, window=budget - 4)],
        HEAVY: [h2o],
        PRUNED: [sdtp],
        BOTH: [sdtp, h2o],
    }


def random_sdtp(model: Any) -> SDTP:
    """SDTP with heads of the shape of those that ship; never trained, they cost as much.

    The schedule is the paper's, every third layer from the fifth; a model of too few layers has one
    stage, before its second layer. Both leave the share `LEFT` of the tokens in the end.
    """
    size, layers = model.config.hidden_size, model.config.num_hidden_layers
    first = 4 if layers > 6 else 1
    stages = len(range(first, layers, 3)) if layers > 6 else 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = SDTPHeads(size, layers, first_layer=first, stages=stages, query_heads=4)
    return SDTP(heads.to(model.device), keep=LEFT ** (1 / stages))


def candidates(model: Any, budget: int) -> dict[str, Make]:
    """Makers of fresh caches by name, the dense one first."""
    composed: dict[str, Make] = {
        name: partial(kvprune.ComposedCache, given)
        for name, given in policies(model, budget).items()
    }
    return {DENSE: lambda: DynamicCache(config=model.config), **composed}


def methods(model: Any) -> dict[str, Make]:
    """Makers of fresh caches for each method of the field by name, the dense one first.

    Those with a budget keep an eighth of the prompt.
    """
    composed: dict[str, Make] = {
        kind.__name__: partial(kvprune.ComposedCache, [kind(0.125)]) for kind in FIELD
    }
    composed[FASTKV] = partial(kvprune.ComposedCache, [FastKV(0.25)])
    return {DENSE: lambda: DynamicCache(config=model.config), **composed}


def in_decoding(model: Any, budget: int) -> dict[str, Make]:
    """Makers of fresh caches whose policies evict in decoding, by name, the dense one first.

    H2O and TOVA do so in every step. The others evict at the end of the prompt, if they are not
    told otherwise: here in every step, and once in a while.
    """
    each: dict[str, kvprune.TokenPolicy] = {
        HEAVY: H2O(heavy=budget // 2, recent=budget - budget // 2),
        "TOVA": TOVA(budget),
    }
    # As many slots in the mean, from one eviction to the next; short trials have small budgets.
    fewer = max(budget - ROUND // 2, budget // 2)
    for kind in (KeyDiff, Knorm, ObservedAttention, ExpectedAttention):
        each[kind.__name__] = kind(budget, when=None)
        each[kind.__name__ + SELDOM] = kind(fewer, when=ROUND)
    composed: dict[str, Make] = {
        name: partial(kvprune.ComposedCache, [policy]) for name, policy in each.items()
    }
    return {DENSE: lambda: DynamicCache(config=model.config), **composed}


def streams(budget: int) -> dict[str, Make]:
    """Makers of fresh caches for a text without end, by name."""
    streaming = partial(StreamingLLM, sinks=4, window=budget - 4)
    h2o = partial(H2O, heavy=budget // 2, recent=budget - budget // 2)
    return {
        STREAMING: lambda: kvprune.ComposedCache([streaming()]),
        HEAVY: lambda: kvprune.ComposedCache([h2o()]),
        STREAMING_INSIDE: lambda: kvprune.ComposedCache([streaming(positions="cache")]),
        HEAVY_INSIDE: lambda: kvprune.ComposedCache([h2o(positions="cache")]),
    }


def random_prompt(model: Any, rows: int, tokens: int) -> Tensor:
    """Ids `[rows, tokens]`, the same in every run: the time does not depend on the ids."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
    return ids.to(model.device)


def held(cache: Any) -> int:
    """The bytes of all storage that a cache has allocated."""
    if isinstance(cache, kvprune.ComposedCache):
        return cache.nbytes
    kept = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)
