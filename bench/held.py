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

    Room for more tokens counts as well. Codes of a store count as they are, and so do columns and
    statistics.
    """
    if cache.store is not None:
        return cache.nbytes
    parts = [part for _, layer in cache.slot_layers() for part in layer.rectangles]
    storages = [t.untyped_storage() for part in parts if part.held for t in part.held.tensors()]
    plain = sum({(at.device, at.data_ptr()): at.nbytes() for at in storages}.values())
    return cache.nbytes - plain * (1 - 2 / model.dtype.itemsize)
