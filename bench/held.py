"""The bytes that a cache holds, as if its keys and values were in bfloat16."""

from __future__ import annotations

from typing import Any

import kvprune


def numbers_of(model: Any) -> int:
    """The numbers in the keys and values of one token, over all heads of a layer."""
    config = model.config
    return 2 * int(config.num_key_value_heads) * int(config.head_dim)


def as_bfloat16(model: Any, cache: kvprune.ComposedCache) -> float:
    """The bytes that a cache holds; each number of plain keys and values counts at two bytes.

    Codes of a store count as they are, and so do columns and statistics.
    """
    if cache.store is not None:
        return cache.nbytes
    # Heads share their columns as long as all keep the same, so that this is a mean over heads.
    kept = (
        (cache.columns(layer) >= 0).sum(-1).double().mean(-1).sum()
        for layer, _ in cache.slot_layers()
    )
    return cache.nbytes - sum(map(float, kept)) * numbers_of(model) * (model.dtype.itemsize - 2)
