"""The one attention function: attention over slots, and the statistics it observes.

Where nobody asked for a statistic, the model's own backend runs, on the slots that the layer
holds and with the model's own rule evaluated at their columns. Where somebody did, attention
runs here, block by block, so that no n x n matrix is ever held; on a GPU by fused kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import flash, fused
from .errors import KVPruneError
from .masks import LazyMask, Mask, additive, as_mask
from .step import LayerStep

BLOCK = 64
"""Queries per block; with its query heads stacked, a block of scores stays in the caches."""


def slot_attention(
    backend: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    kvprune_layer: LayerStep | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function; without a layer of ours, the backend itself.

    Args:
        backend: the implementation that the model had when it was attached.
        module: the attention module.
        query: `[B, Hq, Q, D]`.
        key: `[B, Hkv, S, D]`, as `ComposedCache.update` returned it.
        value: `[B, Hkv, S, Dv]`.
        attention_mask: what our mask function returned, or a mask that the user gave.
        kvprune_layer: this forward at this layer.
        arguments: what else transformers passes (scaling, dropout, softcap, ...).

    Returns:
        `[B, Q, Hq, Dv]`, and the probabilities where the backend returns them.
    """
    stock = _backend(backend, module)
    if kvprune_layer is None:
        return stock(module, query, key, value, attention_mask, **arguments)
    layer = kvprune_layer
    assert attention_mask is not None, "our mask functions always return a rule"
    mask = as_mask(attention_mask, layer.step.seen)
    if not layer.step.one_by_one:
        return _attend(backend, stock, module, layer, query, key, value, mask, **arguments)
    outputs = []
    for new, piece in layer.pieces():
        held = piece.store(key[:, :, new], value[:, :, new])
        mine = query[:, :, new]
        output, _ = _attend(backend, stock, module, piece, mine, *held, mask, **arguments)
        layer.step.evict(piece)
        outputs.append(output)
    return torch.cat(outputs, 1), None


def _attend(
    backend: str,
    stock: Callable[..., tuple[Tensor, Tensor | None]],
    module: torch.nn.Module,
    layer: LayerStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    if layer.slots.names:
        return _observed(backend, module, layer, query, key, value, mask, **arguments), None
    if backend == flash.NAME:
        flashed = flash.attention(layer, query, key, value, mask, **arguments)
        if flashed is not None:
            return flashed[0], None
        backend = flash.instead(**arguments)
        stock = _backend(backend, module)
    dense = _mask_for(backend, layer, query, key, mask)
    return stock(module, query, key, value, dense, **arguments)


def _backend(name: str, module: torch.nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name == flash.NAME:
        return flash.stock
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    # Each model file has its own eager function, which its attention modules fall back to.
    return sys.modules[type(module).__module__].eager_attention_forward


def _mask_for(
    backend: str, layer: LayerStep, query: Tensor, key: Tensor, mask: Mask
) -> Tensor | None:
    """The mask as the backend wants it; None where sdpa needs none."""
    queries, slots = query.shape[2], key.shape[2]
    trivial = mask.plainly_causal and layer.slots.complete and queries in (1, slots)
    if trivial and backend != "eager":
        return None
    dense = mask.at(layer.columns, layer.slots.columns)
    if dense.shape[1] not in (1, query.shape[1]):
        dense = dense.repeat_interleave(query.shape[1] // dense.shape[1], 1)
    return additive(dense, query.dtype) if backend == "eager" else dense


@dataclass(frozen=True)
class _Scores:
    """How scores come about beyond the product of query and key."""

    scaling: float
    softcap: float | None
    sinks: Tensor | None
    dropout: float

    def probabilities(self, scores: Tensor, sinks: Tensor | None, out: Tensor | None) -> Tensor:
        """Softmax over the slots; `sinks` `[..., 1]` take their share and are left out."""
        if sinks is None:
            return torch.softmax(scores, -1, out=out)
        return torch.cat([scores, sinks.expand_as(scores[..., :1])], -1).softmax(-1)[..., :-1]

    def capped(self, scores: Tensor) -> Tensor:
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def dropped(self, probabilities: Tensor, dtype: torch.dtype) -> Tensor:
        probabilities = probabilities.to(dtype)
        if not self.dropout:
            return probabilities
        return torch.nn.functional.dropout(probabilities, self.dropout)


def _observed(
    backend: str,
    module: torch.nn.Module,
    layer: LayerStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Attention over the slots that adds what each slot received to its statistic."""
    if position_bias is not None:
        raise KVPruneError(
            "statistic 'attention' is not observed for models with a learned position bias: "
            "expected position_bias=None. Use a policy without statistics, as StreamingLLM"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    states = (query, key, value, mask)
    result = fused.attention(
        backend, module, layer, *states, scaling, dropout, softcap=softcap, s_aux=s_aux
    )
    if result is None:
        run = _one_query if query.shape[2] == 1 else _block_by_block
        result = run(layer, *states, _Scores(scaling, softcap, s_aux, dropout))
    output, received = result
    heads = layer.slots.keys.shape[1]
    if received.shape[1] != heads:
        # With latent attention (MLA) many heads read the slots of one.
        received = received.unflatten(1, (heads, -1)).sum(2)
    layer.slots.observe("attention", received)
    return output


def _one_query(
    layer: LayerStep, query: Tensor, key: Tensor, value: Tensor, mask: Mask, how: _Scores
) -> tuple[Tensor, Tensor]:
    """One new token per row: all heads at once. Returns what `_block_by_block` does."""
    rows, heads, _, size = query.shape
    grouped = (query * how.scaling).reshape(rows, key.shape[1], -1, size)
    scores = how.capped(torch.matmul(grouped, key.transpose(-1, -2)))
    scores = scores.to(layer.slots.statistics["attention"].dtype)
    if not (mask.plainly_causal and layer.slots.complete):
        here = mask.at(layer.columns, layer.slots.columns)
        if here.shape[1] == heads:
            here = here.view(rows, key.shape[1], -1, key.shape[2])
        scores = _hide(scores, here)
    sinks = None if how.sinks is None else how.sinks.view(1, key.shape[1], -1, 1).to(scores.dtype)
    probabilities = how.probabilities(scores, sinks, out=None)
    output = torch.matmul(how.dropped(probabilities, value.dtype), value)
    received = probabilities.detach().sum(2)
    if not layer.complete:
        # Padding does not vote.
        received = received * (layer.columns >= 0)[:, None]
    return output.view(rows, 1, heads, -1), received


def _hide(scores: Tensor, mask: Tensor) -> Tensor:
    """Applies a mask in place; what it hides stays finite (see `masks.additive`)."""
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return scores.add_(mask)


def _block_by_block(
    layer: LayerStep, query: Tensor, key: Tensor, value: Tensor, mask: Mask, how: _Scores
) -> tuple[Tensor, Tensor]:
    """Several new tokens: one row, one key/value head and one block of queries at a time.

    The new tokens' slots are the last ones, in order, so a block needs no slot behind its
    own end.

    Returns:
        the output `[B, Q, Hq, Dv]`, and what each slot received `[B, Hkv, S]`.
    """
    rows, heads, count, _ = query.shape
    groups, dtype = heads // key.shape[1], layer.slots.statistics["attention"].dtype
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    room = None if tracked else _Room(groups * BLOCK * key.shape[2], query, dtype)
    outputs, received = [], []
    for row in range(rows):
        for head in range(key.shape[1]):
            mine = slice(head * groups, (head + 1) * groups)
            one = _Head(layer, mask, how, row, head, mine, dtype, room)
            output, mass = one.run(query[row, mine], key[row, head], value[row, head])
            outputs.append(output)
            received.append(mass)
    whole = torch.stack(outputs).reshape(rows, heads, count, -1).transpose(1, 2)
    return whole.contiguous(), torch.stack(received).reshape(rows, -1, key.shape[2])


class _Room:
    """Two score buffers that all blocks of a layer reuse."""

    def __init__(self, size: int, like: Tensor, dtype: torch.dtype) -> None:
        self._scores = like.new_empty(size)
        self._probabilities = like.new_empty(size, dtype=dtype)

    def scores_for(self, shape: tuple[int, ...]) -> Tensor:
        """`[G * n, S']`."""
        groups, count, size = shape
        return self._scores[: groups * count * size].view(groups * count, size)

    def probabilities_for(self, shape: tuple[int, ...]) -> Tensor:
        """`[G, n, S']`."""
        groups, count, size = shape
        return self._probabilities[: groups * count * size].view(shape)


@dataclass(frozen=True)
class _Head:
    """One row's one key/value head, with its G query heads stacked into the rows."""

    layer: LayerStep
    mask: Mask
    how: _Scores
    row: int
    head: int
    query_heads: slice
    dtype: torch.dtype
    room: _Room | None

    def run(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """query `[G, Q, D]`, key `[S, D]`, value `[S, Dv]` to `[G, Q, Dv]` and mass `[S]`."""
        transposed = key.t().contiguous()
        count, size = query.shape[1], key.shape[0]
        mass = query.new_zeros(size, dtype=self.dtype)
        outputs = []
        for start in range(0, count, BLOCK):
            stop = min(start + BLOCK, count)
            end = size - count + stop
            p = self._probabilities(query[:, start:stop], transposed[:, :end], start, stop)
            mass[:end] += self._votes(p.detach(), start, stop)
            block = self.how.dropped(p, value.dtype).flatten(0, 1) @ value[:end]
            outputs.append(block.view(query.shape[0], stop - start, -1))
        return torch.cat(outputs, 1), mass

    def _probabilities(self, query: Tensor, key: Tensor, start: int, stop: int) -> Tensor:
        """One block: query `[G, n, D]`, key `[D, S']` to `[G, n, S']`."""
        shape = (*query.shape[:2], key.shape[1])
        rows = (query * self.how.scaling).flatten(0, 1)
        scores = torch.mm(rows, key, out=None if self.room is None else self.room.scores_for(shape))
        scores = self._masked(self.how.capped(scores).view(shape).to(self.dtype), start, stop)
        sinks = self.how.sinks
        if sinks is not None:
            sinks = sinks[self.query_heads].view(-1, 1, 1).to(self.dtype)
        out = None if self.room is None else self.room.probabilities_for(shape)
        return self.how.probabilities(scores, sinks, out)

    def _masked(self, scores: Tensor, start: int, stop: int) -> Tensor:
        """Hides what each query of `[G, n, S']` may not see."""
        count, size = scores.shape[1:]
        if self.mask.plainly_causal and self.layer.slots.complete:
            # Slots before the block are all older; within it, the upper triangle is newer.
            older = torch.ones(count, count, dtype=torch.bool, device=scores.device).tril_()
            _hide(scores[..., size - count :], older)
            return scores
        slots = self.layer.slots.columns[self.row : self.row + 1, :, :size]
        slots = slots[:, self.head : self.head + 1] if slots.shape[1] > 1 else slots
        queries = self.layer.columns[self.row : self.row + 1, start:stop]
        mask = self.mask.at(queries, slots, self.row)[0]
        return _hide(scores, mask[self.query_heads] if mask.shape[0] > 1 else mask)

    def _votes(self, probabilities: Tensor, start: int, stop: int) -> Tensor:
        """What the slots received `[S']`; padding does not vote."""
        if self.layer.complete:
            return probabilities.sum((0, 1))
        votes = self.layer.columns[self.row, start:stop] >= 0
        return votes.to(self.dtype) @ probabilities.sum(0)
