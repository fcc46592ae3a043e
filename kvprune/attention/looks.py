"""Looks: the probabilities that some queries give to slots, and how many queries see a slot.

All of it by the model's own rule, evaluated at columns. Nothing here is part of a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..models.devices import without_autocast
from ..statistics import Block
from .constants import constant
from .hadamard import hadamard
from .inputs import Inputs, Scores, hide
from .masks import is_known, window_of

PROBABILITIES = 1 << 24
"""Probabilities that are held at once, for all rows and heads together."""


@torch.no_grad()
def looks(
    query: Tensor, columns: Tensor, inputs: Inputs, scores: Scores, heads: int, dtype: torch.dtype
) -> Tensor:
    """The probabilities that queries give to the slots of a layer.

    Args:
        query: `[B, Hq, w, D]`.
        columns: `[B, w]` int64, -1 for a query that a row does not have.
        inputs: a forward at the layer, for its slots and its rule; not for its queries.
        scores: the steps between products and outputs.
        heads: the key/value heads that are stored; with latent attention (MLA) one, however many
            are attended to.
        dtype: of the result; products are made in it.

    Returns:
        `[B, heads, G, w, S]`, detached; 0 where a query may not see a slot.
    """
    if inputs.pieces is not None:
        lanes = inputs.pieces.lanes
        held = 1 if lanes.by_head else heads
        each = inputs.by_piece(query, columns)
        apart = [looks(one.query, one.query_columns, one, scores, held, dtype) for one in each]
        return lanes.join(apart, 0, axis=4)
    with without_autocast(query.device):
        key = inputs.key if inputs.coded is None else inputs.coded[0].vectors(dtype)
        key = key.detach().to(dtype)
        rows, attended = key.shape[:2]
        query = hadamard(query) if inputs.turned else query
        grouped = (query.detach().to(dtype) * scores.scaling).unflatten(1, (attended, -1))
        products = torch.matmul(grouped.flatten(2, 3), key.transpose(-1, -2))
        products = scores.capped(products).unflatten(2, grouped.shape[2:4])
        mask = inputs.mask.at(columns, inputs.slot_columns)
        mask = mask.unflatten(1, (attended, -1)) if mask.shape[1] > 1 else mask[:, None]
        sinks = scores.sinks
        if sinks is not None:
            sinks = sinks.detach().view(1, attended, -1, 1, 1).to(dtype)
        found = scores.probabilities(hide(products, mask), sinks, out=None)
        # A query that sees nothing, as padding, looks at everything alike.
        seen = _visible(mask) & (columns >= 0)[:, None, None, :, None]
        found = found.masked_fill(~seen, 0)
    return found if attended == heads else found.reshape(rows, heads, -1, *found.shape[3:])


def blocks(
    inputs: Inputs, scores: Scores, heads: int, dtype: torch.dtype, newest: int | None
) -> Iterator[Block]:
    """The probabilities of a forward's queries, block after block, in order.

    Args:
        inputs, scores, heads, dtype: see `looks`.
        newest: how many queries are wanted, the last ones; None for all.
    """
    rows, query_heads, count, _ = inputs.query.shape
    start = 0 if newest is None else max(0, count - newest)
    if newest is not None and not inputs.no_padding:
        # Padding may be behind a row's tokens.
        start = 0
    size = max(1, PROBABILITIES // (rows * query_heads * inputs.key.shape[2]))
    for first in range(start, count, size):
        here = slice(first, first + size)
        columns = inputs.query_columns[:, here]
        found = looks(inputs.query[:, :, here], columns, inputs, scores, heads, dtype)
        yield Block(found, columns, inputs.slot_columns, inputs.no_padding)


CACHED = 1 << 20
"""Probabilities that are held at once where each block is read several times, by softmax and all.

About what a processor's caches hold.
"""


@torch.no_grad()
def blocks_of_repeat(
    inputs: Inputs, scores: Scores, heads: int, dtype: torch.dtype
) -> Iterator[Block]:
    """The same as `blocks`, where a query sees every slot but those of later queries.

    The slots of the queries are the last ones; they are left out of the blocks.

    Args:
        inputs: without padding, empty slots, codes or several rectangles.
        scores, heads, dtype: see `looks`.
    """
    with without_autocast(inputs.query.device):
        key = inputs.key.detach().to(dtype)
        rows, attended, size, _ = key.shape
        query = (inputs.query.detach().to(dtype) * scores.scaling).unflatten(1, (attended, -1))
        groups, count = query.shape[2:4]
        before, key = size - count, key.transpose(-1, -2)
        step = min(count, max(1, CACHED // (rows * attended * groups * size)))
        room = query.new_empty(rows * attended * groups * step * size)
        later = torch.ones(step, step, dtype=torch.bool, device=key.device).triu(1)
        for first in range(0, count, step):
            stop = min(first + step, count)
            new, seen = stop - first, before + stop
            block = query[:, :, :, first:stop].flatten(2, 3)
            found = room[: rows * attended * groups * new * seen].view(rows, attended, -1, seen)
            torch.matmul(block, key[..., :seen], out=found)
            if scores.softcap is not None:
                found.copy_(scores.capped(found))
            by_query = found.unflatten(2, (groups, new))
            by_query[..., -new:].masked_fill_(later[:new, :new], -torch.inf)
            torch.softmax(found, -1, out=found)
            by_query = by_query[..., :before]
            if attended != heads:
                by_query = by_query.reshape(rows, heads, -1, *by_query.shape[3:])
            yield Block(
                by_query, inputs.query_columns[:, first:stop], inputs.slot_columns[..., :before]
            )


@torch.no_grad()
def views(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """How many of a forward's queries may see each slot, `[B, 1|Hkv|Hq, S]`; padding sees none."""
    queries = inputs.query_columns
    if queries.shape[1] == 1 and inputs.sees_all:
        rows, _, size, _ = inputs.key.shape
        return constant(_one, dtype, inputs.query.device).expand(rows, 1, size)
    slots = inputs.slot_columns
    if is_known(inputs.mask, inputs.local):
        return seen_by(queries, slots, window_of(inputs.mask, inputs.local)).to(dtype)
    found = torch.zeros(())
    size = max(1, PROBABILITIES // max(1, slots.numel()))
    for first in range(0, queries.shape[1], size):
        columns = queries[:, first : first + size]
        mask = _visible(inputs.mask.at(columns, slots))
        here = (mask & (columns >= 0)[:, None, :, None]).sum(2)
        found = here if first == 0 else found + here
    return found.to(dtype)


def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def seen_by(queries: Tensor, slots: Tensor, window: int | None) -> Tensor:
    """How many queries see each slot where causality and a window are all that hides.

    Args:
        queries: `[B, Q]` int64 columns, -1 for padding.
        slots: `[B, 1|Hkv, S]` int64 columns, -1 where empty.
        window: a query at column c sees the columns above `c - window`; None for all.

    Returns:
        `[B, 1|Hkv, S]` int64.
    """
    ordered = queries.sort(-1).values
    flat = slots.flatten(1).contiguous()
    seen = ordered.shape[-1] - torch.searchsorted(ordered, flat)
    if window is not None:
        seen -= ordered.shape[-1] - torch.searchsorted(ordered, flat + window)
    return seen.masked_fill(flat < 0, 0).view_as(slots)


def _visible(mask: Tensor) -> Tensor:
    """A mask as bool: where it is not, what is added to scores."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
