"""flash-attn as a backend: where its own causal rule is what the layer's slots need.

flash-attn knows one rule: the query at place i sees the slots up to place `S - Q + i`. New
tokens lie behind the slots of earlier ones, in order, and a single new token sees all slots,
so this is right wherever causality alone hides slots and none is empty, however many were
evicted and in whatever order the rest lies. Everything else (padded rows, a mask of the
user's, attention sinks, drafts in the air, ...) goes to the backend that `instead` names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import mass
from .errors import KVPruneError
from .masks import Mask, is_known, window_of
from .releases import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from .step import LayerStep

NAME = "flash_attention_2"
HALF = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256


def flash_attn_func() -> Callable[..., Any]:
    """flash-attn's function (2.6 or newer, which know a softcap).

    Raises:
        KVPruneError: flash-attn is not installed.
    """
    try:
        function: Callable[..., Any] = importlib.import_module("flash_attn").flash_attn_func
    except (ImportError, AttributeError) as error:
        raise KVPruneError(
            f"attn_implementation={NAME!r}: expected the package flash-attn, came none that can "
            f"be imported ({error}). Install it (pip install 'kvprune[flash]'), or load the "
            f"model with attn_implementation='sdpa'"
        ) from error
    return function


def attention(
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
    with_lse: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None] | None:
    """Attention by flash-attn; None where it cannot say what is meant.

    Args:
        layer: this forward at this layer.
        query, key, value: `[B, Hq, Q, D]`, `[B, Hkv, S, D]`, `[B, Hkv, S, Dv]`.
        mask: the model's rule.
        scaling, dropout, softcap, s_aux, position_bias: what the attention module passes.
        with_lse: whether the log-sum-exp is wanted. Not with dropout, where flash-attn would
            hand back all probabilities beside it.

    Returns:
        `[B, Q, Hq, Dv]` and, if wanted, `[B, Hq, Q]` float32.
    """
    extras = s_aux is not None or position_bias is not None
    if extras or (dropout and (softcap is not None or with_lse)):
        return None
    if not _fits(query, key, value) or not _in_order(layer, query, key, mask):
        return None
    window = window_of(mask, layer.slots.local)
    result = flash_attn_func()(
        *(states.transpose(1, 2) for states in (query, key, value)),
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=0.0 if softcap is None else softcap,
        return_attn_probs=with_lse,
    )
    return (result[0], result[1]) if with_lse else (result, None)


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether flash-attn takes such tensors."""
    one_dtype = query.dtype == key.dtype == value.dtype and query.dtype in HALF
    one_size = query.shape[-1] == value.shape[-1] <= LARGEST_HEAD
    return mass.on_gpu(query) and one_dtype and one_size


def _in_order(layer: LayerStep, query: Tensor, key: Tensor, mask: Mask) -> bool:
    """Whether what a query sees follows from the places of slots."""
    if not layer.slots.complete:
        return False
    if mask.plainly_causal:
        return True
    # A window counts columns, which are places only if nothing was ever left out.
    everything = query.shape[2] == key.shape[2] == layer.step.count
    return everything and is_known(mask, layer.slots.local)


def instead(softcap: float | None = None, s_aux: Tensor | None = None, **_: Any) -> str:
    """The backend for what `attention` leaves; sdpa knows neither softcap nor sinks."""
    return "sdpa" if softcap is None and s_aux is None else "eager"


def stock(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """transformers' own function, for calls without one of our caches.

    It looks its kernel up by the implementation that the module's config names, which is ours
    on an attached model.
    """
    config = _With(module.config, _attn_implementation=NAME)
    function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS[NAME]
    return function(_With(module, config=config), *args, **kwargs)


class _With:
    """An object as it is, but for some attributes."""

    def __init__(self, given: Any, **instead: Any) -> None:
        self.__dict__.update(instead, _given=given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_given"], name)
