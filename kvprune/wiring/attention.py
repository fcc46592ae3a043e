"""The attention function that attached models call, registered with transformers by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention.dispatch import stock_attention
from ..attention.masks import LazyMask, as_mask
from ..engine.layer_step import LayerStep
from ..models.backends import PREFIX
from ..models.families import copies_of_heads, lost_keyword
from ..models.heads import as_before, neighbours, without_copies


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
    """Attends, then has the policies evict. Without a layer of ours it is the backend itself.

    Args:
        backend: the implementation that the model had when it was attached.
        module: the attention module.
        query: `[B, Hq, Q, D]`.
        key: `[B, Hkv, S, D]`, as `ComposedCache.update` returned it.
        value: `[B, Hkv, S, Dv]`.
        attention_mask: what our mask function returned, or a mask that the user gave.
        kvprune_layer: this forward at this layer; from the hook on the decoder layer.
        arguments: what else transformers passes (scaling, dropout, softcap, ...).

    Returns:
        `[B, Q, Hq, Dv]`, and the probabilities where the backend returns them.

    Raises:
        KVPruneError: the decoder layer did not hand `kvprune_layer` on.
    """
    if kvprune_layer is None:
        if isinstance(attention_mask, LazyMask):
            raise lost_keyword(module)
        stock = stock_attention(backend, module)
        return stock(module, query, key, value, attention_mask, **arguments)
    assert attention_mask is not None, "our mask functions always return a rule"
    layer = kvprune_layer.on(query.device)
    layer.step.attentions += 1
    copies = copies_of_heads(module)
    if copies == 1:
        mask = as_mask(attention_mask, layer.step.seen)
        return layer.attend(backend, module, query, key, value, mask, **arguments)
    # From here on neighbouring query heads read the same key/value head.
    if isinstance(attention_mask, Tensor) and attention_mask.shape[1] > 1:
        attention_mask = neighbours(attention_mask, copies)
    key, value = without_copies(key, copies), without_copies(value, copies)
    mask = as_mask(attention_mask, layer.step.seen)
    states = (neighbours(query, copies), key, value, mask)
    output, weights = layer.attend(backend, module, *states, **arguments)
    weights = None if weights is None else as_before(weights, copies, axis=1)
    return as_before(output, copies, axis=2), weights


class _Eager(str):
    """The name that an attached config has for our function around a model's own eager one.

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
    """The name that an attached config has for our function around a backend."""
    return _Eager(PREFIX + backend) if backend == "eager" else PREFIX + backend
