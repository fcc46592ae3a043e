"""The trace of one prompt: the tokens that each layer still holds, small enough for one line."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...cache.composed import ComposedCache
from ...errors import KVPruneError
from ..ledger.results import Cell, Trace

MOST = 3
"""The highest level: all heads hold the token. 2 is at least half of them, 1 fewer, 0 none."""


def trace_of(cache: ComposedCache, tokens: Sequence[str], cell: Cell, sample: int) -> Trace:
    """The trace of the prompt that a cache has just read.

    For 2,000 tokens and 30 layers it takes at most 21 kB beside the tokens, and a few kB if the
    tokens that are kept lie together.

    Args:
        cache: a cache of one row, with nothing generated yet.
        tokens: the texts of the prompt's tokens.
        cell: the cell that is run.
        sample: the number of the sample.

    Raises:
        KVPruneError: a cache of several rows, or one that has not read just these tokens.
    """
    if cache.seen != len(tokens):
        raise KVPruneError(
            f"trace_of: expected a cache that has read the {len(tokens)} tokens given and nothing "
            f"more, got one that has read {cache.seen}: call it before anything is generated"
        )
    slots = {index: cache.columns(index) for index, _ in cache.slot_layers()}
    if any(columns.shape[0] != 1 for columns in slots.values()):
        raise KVPruneError("trace_of: expected a cache of one row, got a batch")
    kept = (
        packed(_levels(slots[layer], len(tokens))) if layer in slots else ""
        for layer in range(len(cache))
    )
    return Trace(cell, sample, tuple(tokens), tuple(kept))


def _levels(columns: Tensor, length: int) -> NDArray[np.uint8]:
    """The levels `[length]` of columns `[1, H, S]`, which are -1 where a head holds fewer."""
    heads = columns.shape[1]
    count = np.bincount(columns[columns >= 0].cpu().numpy(), minlength=length)
    return np.select([count == heads, 2 * count >= heads, count > 0], [MOST, 2, 1]).astype(np.uint8)


def packed(levels: NDArray[np.uint8]) -> str:
    """Levels `[n]` of 0 to 3 as text: two planes of bits, deflated, in base64."""
    planes = np.packbits(np.stack([levels & 1, levels >> 1]), axis=1)
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode("ascii")


def levels(trace: Trace) -> NDArray[np.uint8]:
    """The levels of a trace's layers.

    Returns:
        `[layers that hold slots, n]`, 0 to 3; see `MOST`.

    Raises:
        KVPruneError: the text of a layer is not what `trace_of` writes for so many tokens.
    """
    rows = [_unpacked(text, len(trace.tokens)) for text in trace.kept if text]
    return np.stack(rows) if rows else np.zeros((0, len(trace.tokens)), np.uint8)


def _unpacked(text: str, length: int) -> NDArray[np.uint8]:
    try:
        raw = zlib.decompress(base64.b64decode(text, validate=True))
        planes = np.frombuffer(raw, np.uint8).reshape(2, -(-length // 8))
    except (ValueError, zlib.error) as error:
        raise KVPruneError(
            f"trace: expected the kept columns of {length} tokens, got {text[:40]!r}: {error}. "
            f"The results file is damaged here"
        ) from error
    low, high = np.unpackbits(planes, axis=1, count=length)
    return low + 2 * high


def held(trace: Trace) -> NDArray[np.float64]:
    """The share of layers and heads that hold each token, `[n]`, 0 to 1.

    Layers without slots are left out; the share of a layer's heads is its level over `MOST`.
    """
    found = levels(trace)
    return found.mean(0) / MOST if len(found) else np.zeros(len(trace.tokens))
