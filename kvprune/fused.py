"""Attention that observes, on a GPU: outputs by a fused kernel, then what slots received.

The blocks of `blocks.py` are made for a CPU's caches; on a GPU they would be thousands of
small kernels. Here flash-attn or sdpa computes the outputs, and the statistic follows from
each query's log-sum-exp (see `mass.py`): flash-attn hands that back; sdpa does not, in a way
that is public and the same for all of its kernels, so it takes one more pass over the keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import flash, mass
from .heads import for_backend
from .masks import Mask, is_known, window_of
from .releases import ALL_ATTENTION_FUNCTIONS
from .step import LayerStep

MASKED = 1 << 26
"""Entries of a mask for sdpa that are held at once."""


def attention(
    backend: str,
    module: nn.Module,
    layer: LayerStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Attention of several new tokens at once; None where `attention.py` does it itself.

    That is: not on a GPU; a single token, whose probabilities are few; attention sinks;
    soft-capping without flash-attn; a mask that is not causality, padding and a sliding window.

    Args:
        backend: the implementation that the model had when it was attached.
        module: the attention module.
        layer: this forward at this layer.
        query, key, value: `[B, Hq, Q, D]`, `[B, Hkv, S, D]`, `[B, Hkv, S, Dv]`.
        mask: the model's rule.
        scaling, dropout, softcap, s_aux: how scores and outputs come about.

    Returns:
        the output `[B, Q, Hq, Dv]`, and what each slot received `[B, Hkv, S]`.
    """
    several = mass.on_gpu(query) and query.shape[2] > 1
    if not several or s_aux is not None or not is_known(mask, layer.slots.local):
        return None
    window = window_of(mask, layer.slots.local)
    columns = (layer.columns, layer.slots.columns)
    flashed = None
    if backend == flash.NAME:
        flashed = flash.attention(
            layer, query, key, value, mask, scaling, dropout, softcap, with_lse=True
        )
    if flashed is not None:
        output, lse = flashed
        assert lse is not None
    elif softcap is None:
        output = _by_sdpa(module, layer, query, key, value, mask, scaling, dropout)
        lse = mass.log_sum_exp(query, key, *columns, scaling, softcap, window)
    else:
        return None
    received = mass.attention_mass(query, key, lse, *columns, scaling, softcap, window)
    return output, received


def _by_sdpa(
    module: nn.Module,
    layer: LayerStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scaling: float,
    dropout: float,
) -> Tensor:
    """`[B, Q, Hq, Dv]`, with no mask where causality is all, else in blocks of queries."""
    count, held = query.shape[2], key.shape[2]
    key, value = for_backend(module, key, value)
    options: dict[str, Any] = {"scaling": scaling, "dropout": dropout}
    run = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if mask.plainly_causal and layer.slots.complete and count == held:
        output: Tensor = run(module, query, key, value, None, **options)[0]
        return output
    slots, outputs = layer.slots.columns, []
    size = max(1, MASKED // (query.shape[0] * query.shape[1] * held))
    for start in range(0, count, size):
        stop = min(start + size, count)
        # The new tokens' slots are the last ones, in order: none behind the block's end counts.
        end = held - count + stop
        here = mask.at(layer.columns[:, start:stop], slots[..., :end])
        if here.shape[1] > 1:
            here = here.repeat_interleave(query.shape[1] // here.shape[1], 1)
        block = (query[:, :, start:stop], key[:, :, :end], value[:, :, :end])
        outputs.append(run(module, *block, here, **options)[0])
    return torch.cat(outputs, 1)
