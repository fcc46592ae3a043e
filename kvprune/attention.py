"""The one attention function: attention over slots, and the statistics it observes.

Where nobody asked for a statistic, the model's own backend runs, on the slots that the layer
holds and with the model's own rule evaluated at their columns. Where somebody did, attention
runs here, block by block, so that no n x n matrix is ever held; on a GPU by fused kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import flash, fused
from .blocks import Scores, block_by_block, hide
from .devices import autocast_dtype
from .errors import KVPruneError
from .families import PREFIX, copies_of_heads, lost_keyword
from .heads import as_before, for_backend, neighbours, without_copies
from .masks import LazyMask, Mask, additive, as_mask
from .releases import ALL_ATTENTION_FUNCTIONS
from .step import LayerStep


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
    """The registered attention function: attends, then has the policies evict.

    Without a layer of ours it is the backend itself.

    Args:
        backend: the implementation that the model had when it was attached.
        module: the attention module.
        query: `[B, Hq, Q, D]`.
        key: `[B, Hkv, S, D]`, as `ComposedCache.update` returned it.
        value: `[B, Hkv, S, Dv]`.
        attention_mask: what our mask function returned, or a mask that the user gave.
        kvprune_layer: this forward at this layer; from `attach`'s hook on the decoder layer.
        arguments: what else transformers passes (scaling, dropout, softcap, ...).

    Returns:
        `[B, Q, Hq, Dv]`, and the probabilities where the backend returns them.
    """
    stock = _backend(backend, module)
    if kvprune_layer is None:
        if isinstance(attention_mask, LazyMask):
            raise lost_keyword(module)
        return stock(module, query, key, value, attention_mask, **arguments)
    layer = kvprune_layer.on(query.device)
    layer.step.unattended -= 1
    copies = copies_of_heads(module)
    if copies == 1:
        states = (query, key, value, attention_mask)
        return _attend_and_evict(backend, stock, module, layer, *states, **arguments)
    if isinstance(attention_mask, Tensor) and attention_mask.shape[1] > 1:
        attention_mask = neighbours(attention_mask, copies)
    key, value = without_copies(key, copies), without_copies(value, copies)
    states = (neighbours(query, copies), key, value, attention_mask)
    output, weights = _attend_and_evict(backend, stock, module, layer, *states, **arguments)
    weights = None if weights is None else as_before(weights, copies, axis=1)
    return as_before(output, copies, axis=2), weights


def _attend_and_evict(
    backend: str,
    stock: Callable[..., tuple[Tensor, Tensor | None]],
    module: torch.nn.Module,
    layer: LayerStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """`slot_attention` where neighbouring query heads read the same key/value head."""
    assert attention_mask is not None, "our mask functions always return a rule"
    mask = as_mask(attention_mask, layer.step.seen)
    if not layer.step.one_by_one:
        output, weights = _attend(
            backend, stock, module, layer, query, key, value, mask, **arguments
        )
        # Before the layer evicts: the slots are still those that were attended to.
        weights = shown(layer, weights)
        layer.step.evict(layer)
        return output, weights
    outputs = []
    for new, piece in layer.pieces():
        held = piece.store(key[:, :, new], value[:, :, new])
        mine = query[:, :, new]
        output, _ = _attend(backend, stock, module, piece, mine, *held, mask, **arguments)
        layer.step.evict(piece)
        outputs.append(output)
    return torch.cat(outputs, 1), None


def shown(layer: LayerStep, probabilities: Tensor | None) -> Tensor | None:
    """Probabilities as a user who asked for them gets them: in the order of columns.

    Notes which columns these are, for `ComposedCache.attended`. Does nothing where nobody asked.

    Args:
        layer: this forward at this layer, before it evicts.
        probabilities: `[B, Hq, Q, S]`, over the slots; None where the backend returns none.

    Returns:
        `[B, Hq, Q, S']`, without slots that are empty in every row and head.
    """
    if layer.step.attended is None or probabilities is None:
        return probabilities
    columns, order = layer.slots.columns.sort(-1)
    most = int((columns >= 0).sum(-1).amax())
    first = columns.shape[-1] - most
    layer.step.attended[layer.index] = columns[..., first:]
    heads = probabilities.shape[1] // order.shape[1]
    index = order[..., first:].repeat_interleave(heads, 1)[:, :, None]
    return probabilities.gather(-1, index.expand(*probabilities.shape[:-1], -1))


class _Eager(str):
    """What an attached config calls our function around a model's own eager one.

    transformers allows `config.output_attentions` under the name "eager" alone, which this equals
    too; registries, which go by the hash, find our function. Both methods are in Python so that
    compiled code can follow them.
    """

    def __eq__(self, other: object) -> bool:
        return other in ("eager", PREFIX + "eager")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(PREFIX + "eager")


def name_of(backend: str) -> str:
    """What an attached config calls our function around a backend."""
    return _Eager(PREFIX + backend) if backend == "eager" else PREFIX + backend


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
    return stock(module, query, *for_backend(module, key, value), dense, **arguments)


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
    heads = layer.slots.keys.shape[1]
    if heads not in (1, key.shape[1]):
        raise KVPruneError(
            f"statistic 'attention': {type(module).__name__} stores {heads} key/value heads and "
            f"attends to {key.shape[1]}, so it is unknown which query head reads which of them: "
            f"this family is not supported with policies that observe attention. Use a policy "
            f"without statistics, as StreamingLLM"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = _cast(query, key, value)
    states = (query, key, value, mask)
    result = fused.attention(
        backend, module, layer, *states, scaling, dropout, softcap=softcap, s_aux=s_aux
    )
    if result is None:
        run = _one_query if query.shape[2] == 1 else block_by_block
        result = run(layer, *states, Scores(scaling, softcap, s_aux, dropout))
    output, received = result
    if received.shape[1] != heads:
        # With latent attention (MLA) many heads read the slots of one.
        received = received.unflatten(1, (heads, -1)).sum(2)
    layer.slots.observe("attention", received)
    return output


def _cast(*states: Tensor) -> tuple[Tensor, ...]:
    """What autocast hands to a backend, as it does not look into our own kernels and `out=`."""
    dtype = autocast_dtype(states[0].device)
    if dtype is None:
        return states
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in states)


def _one_query(
    layer: LayerStep, query: Tensor, key: Tensor, value: Tensor, mask: Mask, how: Scores
) -> tuple[Tensor, Tensor]:
    """One new token per row: all heads at once. Returns what `block_by_block` does."""
    rows, heads, _, size = query.shape
    grouped = (query * how.scaling).reshape(rows, key.shape[1], -1, size)
    scores = how.capped(torch.matmul(grouped, key.transpose(-1, -2)))
    scores = scores.to(layer.slots.statistics["attention"].dtype)
    if not (mask.plainly_causal and layer.slots.complete):
        here = mask.at(layer.columns, layer.slots.columns)
        if here.shape[1] == heads:
            here = here.view(rows, key.shape[1], -1, key.shape[2])
        scores = hide(scores, here)
    sinks = None if how.sinks is None else how.sinks.view(1, key.shape[1], -1, 1).to(scores.dtype)
    probabilities = how.probabilities(scores, sinks, out=None)
    output = torch.matmul(how.dropped(probabilities, value.dtype), value)
    received = probabilities.detach().sum(2)
    if not layer.complete:
        # Padding does not vote.
        received = received * (layer.columns >= 0)[:, None]
    return output.view(rows, 1, heads, -1), received
