"""Attention modules that compute attention by themselves, without AttentionInterface.

They are handed tensors over all columns, as the model made them. Before such a module runs,
its mask and ALiBi are gathered to the slots that the layer will hold once the module has
stored its new tokens; after it, what the slots received is read off the probabilities that
it returns. They are then held as a whole, `[B, Hq, Q, S]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention.masks import GivenMask, additive
from ..engine.layer_step import LayerStep
from ..models.backends import backend_of
from ..models.structure import argument, with_argument

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def at_slots(
    attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: LayerStep
) -> Arguments:
    """The arguments of an attention module, gathered to the slots that it will attend to."""
    layer = layer.on(argument(attention, args, kwargs, "hidden_states").device)
    slots = layer.slots.columns_after(layer.slot_columns, in_free_slot=layer.step.count == 1)
    mask = argument(attention, args, kwargs, "attention_mask")
    alibi = argument(attention, args, kwargs, "alibi")
    mask = GivenMask(mask, layer.step.seen).at(layer.columns, slots)
    alibi = None if alibi is None else _alibi_at(alibi, slots, _closed(layer, slots))
    observed = any(part.of_attention for part in layer.slots.parts)
    wanted = observed or layer.step.attended is not None or layer.step.repeat is not None
    if wanted and _keeps_probabilities_back(attention):
        # The branch that returns them adds the mask to the scores, and ALiBi once more, which
        # is part of this mask.
        mask = additive(mask, argument(attention, args, kwargs, "hidden_states").dtype)
        alibi = None if alibi is None else torch.zeros_like(alibi)
        args, kwargs = with_argument(attention, args, kwargs, "output_attentions", True)
    args, kwargs = with_argument(attention, args, kwargs, "attention_mask", mask)
    return with_argument(attention, args, kwargs, "alibi", alibi)


def _keeps_probabilities_back(attention: Any) -> bool:
    """Whether a module returns probabilities only if asked: Falcon's does, with sdpa."""
    config = getattr(attention, "config", None)
    return config is not None and backend_of(config) == "sdpa"


def _closed(layer: LayerStep, slots: Tensor) -> Tensor | None:
    """How much nearer to the newest token each slot stands than in the text, `[B, 1|H, S]`.

    As a share of the newest token's distance from its row's first; None where positions are those
    of the text.
    """
    step = layer.step
    if step.cache_positions is None:
        return None
    closed = step.cache_positions.distance_closed(layer, slots)
    padding = 0 if layer.padding is None else layer.padding.sum(-1)[:, None, None]
    return closed.double() / (layer.seen - 1 - torch.as_tensor(padding)).clamp(min=1)


def _alibi_at(alibi: Tensor, slots: Tensor, closed: Tensor | None) -> Tensor:
    """ALiBi at the slots' columns.

    Args:
        alibi: `[B * Hq, 1, N]` or `[B, Hq, 1, N]`, by column.
        slots: `[B, 1|Hkv, S]`, columns, -1 where empty.
        closed: `[B, 1|Hkv, S]`, see `_closed`; None where every slot stays.

    Returns:
        the same with S for N.
    """
    by_head = alibi.reshape(slots.shape[0], -1, alibi.shape[-1])
    columns = slots.clamp(min=0).repeat_interleave(by_head.shape[1] // slots.shape[1], 1)
    bias = by_head.gather(-1, columns)
    if closed is not None:
        closed = closed.repeat_interleave(by_head.shape[1] // closed.shape[1], 1)
        bias = bias + closed.to(bias.dtype) * by_head[..., -1:]
    return bias.reshape(*alibi.shape[:-1], -1)
