"""Attention that observes, on a GPU: outputs by a fused kernel, then what slots received.

The blocks of `blockwise.py` are made for a CPU's caches; on a GPU they would be thousands of
small kernels. Here flash-attn or sdpa computes the outputs, and the statistic follows from
each query's log-sum-exp (see `received.py`): flash-attn hands that back; sdpa does not, in a way
that is public and the same for all of its kernels, so it takes one more pass over the keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.backends import FLASH
from ..models.heads import for_backend
from ..models.releases import ALL_ATTENTION_FUNCTIONS
from . import flash, received
from .inputs import Inputs, Scores
from .masks import is_known, window_of

MASKED = 1 << 26
"""Entries of a mask for sdpa that are held at once."""


def attention(
    backend: str, module: nn.Module, inputs: Inputs, how: Scores
) -> tuple[Tensor, Tensor] | None:
    """Attention of several new tokens at once; None where `dispatch.py` does it itself.

    That is: not on a GPU; attention sinks; soft-capping without flash-attn; a mask that is not
    causality, padding and a sliding window.

    Args:
        backend: the implementation that the model had when it was attached.
        module: the attention module.
        inputs: queries and slots.
        how: what scores are beyond products.

    Returns:
        the output `[B, Q, Hq, Dv]`, and what each slot received `[B, Hkv, S]`.
    """
    query, key = inputs.query, inputs.key
    fits = received.on_gpu(query) and how.sinks is None
    if not fits or not is_known(inputs.mask, inputs.local):
        return None
    window = window_of(inputs.mask, inputs.local)
    columns = (inputs.query_columns, inputs.slot_columns)
    flashed = None
    if backend == FLASH:
        flashed = flash.attention(inputs, how.scaling, how.dropout, how.softcap, with_lse=True)
    if flashed is not None:
        output, lse = flashed
        assert lse is not None
    elif how.softcap is None:
        output = _by_sdpa(module, inputs, how)
        lse = received.log_sum_exp(query, key, *columns, how.scaling, how.softcap, window)
    else:
        return None
    found = received.attention_received(query, key, lse, *columns, how.scaling, how.softcap, window)
    return output, found


def _by_sdpa(module: nn.Module, inputs: Inputs, how: Scores) -> Tensor:
    """`[B, Q, Hq, Dv]`, with no mask where causality is all, else in blocks of queries."""
    query, slots = inputs.query, inputs.slot_columns
    count, held = query.shape[2], inputs.key.shape[2]
    key, value = for_backend(module, inputs.key, inputs.value)
    options: dict[str, Any] = {"scaling": how.scaling, "dropout": how.dropout}
    run = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if inputs.mask.plainly_causal and inputs.no_gaps and count == held:
        output: Tensor = run(module, query, key, value, None, **options)[0]
        return output
    outputs = []
    size = max(1, MASKED // (query.shape[0] * query.shape[1] * held))
    for start in range(0, count, size):
        stop = min(start + size, count)
        # The new tokens' slots are the last ones, in order: none behind the block's end counts.
        end = held - count + stop
        here = inputs.mask.at(inputs.query_columns[:, start:stop], slots[..., :end])
        if here.shape[1] > 1:
            here = here.repeat_interleave(query.shape[1] // here.shape[1], 1)
        block = (query[:, :, start:stop], key[:, :, :end], value[:, :, :end])
        outputs.append(run(module, *block, here, **options)[0])
    return torch.cat(outputs, 1)
