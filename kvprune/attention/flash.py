"""flash-attn as a backend: where its own causal rule is what the layer's slots need.

flash-attn knows one rule: the query at place i sees the slots up to place `S - Q + i`. New
tokens lie behind the slots of earlier ones, in order, and a single new token sees all slots,
so this is right wherever causality alone hides slots and none is empty, however many were
evicted and in whatever order the rest lies. Everything else (padded rows, a mask of the
user's, attention sinks, drafts in the air, ...) goes to the backend that `instead` names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models.backends import FLASH, flash_attn_func
from ..models.releases import ALL_ATTENTION_FUNCTIONS
from . import received
from .inputs import Inputs
from .masks import is_known, window_of

HALF = (torch.float16, torch.bfloat16)


LARGEST_HEAD = 256


def attention(
    inputs: Inputs,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    with_lse: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None] | None:
    """Attention by flash-attn; None where it cannot say what is meant.

    Args:
        inputs: queries and slots.
        scaling, dropout, softcap, s_aux, position_bias: what the attention module passes.
        with_lse: whether the log-sum-exp is wanted. Not with dropout, where flash-attn would
            hand back all probabilities beside it.

    Returns:
        `[B, Q, Hq, Dv]` and, if wanted, `[B, Hq, Q]` float32.
    """
    extras = s_aux is not None or position_bias is not None
    if extras or (dropout and (softcap is not None or with_lse)):
        return None
    if not _fits(inputs) or not _in_order(inputs):
        return None
    window = window_of(inputs.mask, inputs.local)
    result = flash_attn_func()(
        *(states.transpose(1, 2) for states in (inputs.query, inputs.key, inputs.value)),
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=0.0 if softcap is None else softcap,
        return_attn_probs=with_lse,
    )
    return (result[0], result[1]) if with_lse else (result, None)


def _fits(inputs: Inputs) -> bool:
    """Whether flash-attn takes such tensors."""
    query, key, value = inputs.query, inputs.key, inputs.value
    one_dtype = query.dtype == key.dtype == value.dtype and query.dtype in HALF
    one_size = query.shape[-1] == value.shape[-1] <= LARGEST_HEAD
    return received.on_gpu(query) and one_dtype and one_size


def _in_order(inputs: Inputs) -> bool:
    """Whether what a query sees follows from the places of slots."""
    if not inputs.no_gaps:
        return False
    if inputs.mask.plainly_causal:
        return True
    # A window counts columns, which are places only if nothing was ever left out.
    everything = inputs.query.shape[2] == inputs.key.shape[2] == inputs.count
    return everything and is_known(inputs.mask, inputs.local)


def instead(softcap: float | None = None, s_aux: Tensor | None = None, **_: Any) -> str:
    """The backend for what `attention` leaves; sdpa knows neither softcap nor sinks."""
    return "sdpa" if softcap is None and s_aux is None else "eager"


def stock(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """transformers' own function, for calls without one of our caches.

    It looks its kernel up by the implementation that the module's config names, which is ours
    on an attached model.
    """
    config = _With(module.config, _attn_implementation=FLASH)
    function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS[FLASH]
    return function(_With(module, config=config), *args, **kwargs)


class _With:
    """An object as it is, but for some attributes."""

    def __init__(self, given: Any, **instead: Any) -> None:
        self.__dict__.update(instead, _given=given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_given"], name)
