"""Attention over slots, with or without what each slot receives: tensors in, tensors out.

Where nobody asked for a statistic, the model's own backend runs, on the slots that the layer
holds and with the model's own rule evaluated at their columns. Where somebody did, attention
runs here, block by block, so that no n x n matrix is ever held; on a GPU by fused kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import KVPruneError
from ..models.backends import FLASH
from ..models.devices import autocast_dtype
from ..models.heads import for_backend
from ..models.releases import ALL_ATTENTION_FUNCTIONS
from ..statistics import statistic_dtype
from . import flash, fused
from .blockwise import block_by_block
from .hadamard import hadamard
from .inputs import Inputs, Scores, hide
from .masks import additive


def attend(
    backend: str, module: torch.nn.Module, inputs: Inputs, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention by the model's own backend.

    Args:
        backend: the implementation that the model had when it was attached.
        module: the attention module.
        inputs: queries and slots.
        arguments: what else transformers passes (scaling, dropout, softcap, ...).

    Returns:
        `[B, Q, Hq, Dv]`, and the probabilities `[B, Hq, Q, S]` where the backend returns them.
    """
    # Codes turn queries and sums by themselves, and pieces are turned one by one.
    if inputs.turned and not inputs.apart:
        turned, probabilities = attend(backend, module, inputs.with_turned_queries(), **arguments)
        return hadamard(turned), probabilities
    if inputs.pieces is not None:
        each = inputs.by_piece(inputs.query, inputs.query_columns)
        outputs = [attend(backend, module, one, **arguments)[0] for one in each]
        return inputs.pieces.lanes.join_outputs(outputs), None
    if inputs.coded is not None:
        scores = scores_for(module, inputs, inputs.key.shape[1], **arguments)
        # Here padding has probabilities, as in the stock function.
        inputs = replace(inputs, no_padding=True)
        output, found = _one_query(inputs, scores, statistic_dtype(inputs.query.dtype))
        shown = found.flatten(1, 2)[:, :, None].to(output.dtype)
        return output, shown if backend == "eager" else None
    if backend == FLASH:
        flashed = flash.attention(inputs, **arguments)
        if flashed is not None:
            return flashed[0], None
        backend = flash.instead(**arguments)
    key, value = for_backend(module, inputs.key, inputs.value)
    mask = _mask_for(backend, inputs)
    return stock_attention(backend, module)(module, inputs.query, key, value, mask, **arguments)


def stock_attention(
    backend: str, module: torch.nn.Module
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that transformers itself calls for a backend."""
    if backend == FLASH:
        return flash.stock
    if backend != "eager":
        return ALL_ATTENTION_FUNCTIONS[backend]
    # Each model file has its own eager function, which its attention modules fall back to.
    return sys.modules[type(module).__module__].eager_attention_forward


def _mask_for(backend: str, inputs: Inputs) -> Tensor | None:
    """The mask as a backend wants it; None where sdpa needs none."""
    heads, queries, slots = *inputs.query.shape[1:3], inputs.key.shape[2]
    trivial = inputs.mask.plainly_causal and inputs.no_gaps and queries in (1, slots)
    if trivial and backend != "eager":
        return None
    dense = inputs.mask.at(inputs.query_columns, inputs.slot_columns)
    if dense.shape[1] not in (1, heads):
        dense = dense.repeat_interleave(heads // dense.shape[1], 1)
    return additive(dense, inputs.query.dtype) if backend == "eager" else dense


@dataclass(frozen=True)
class Observed:
    """Attention with what each slot received.

    output: `[B, Q, Hq, Dv]`.
    by_several: `[B, heads, S]`, what is `received` of several queries; None of a single one.
    probabilities: `[B, heads, G, S]`, detached, 0 for padding; None where there are several
        queries.
    """

    output: Tensor
    by_several: Tensor | None
    probabilities: Tensor | None

    @property
    def received(self) -> Tensor:
        """`[B, heads, S]`, the attention that each slot received, detached.

        Summed over queries and the query heads of its head; padding does not vote.
        """
        if self.by_several is not None:
            return self.by_several
        assert self.probabilities is not None
        return self.probabilities.sum(2)


def attend_and_observe(
    backend: str,
    module: torch.nn.Module,
    inputs: Inputs,
    scores: Scores,
    heads: int,
    dtype: torch.dtype,
) -> Observed:
    """Attention that also says what each slot received.

    Args:
        backend, module, inputs: see `attend`.
        scores: the steps between products and outputs; see `scores_for`.
        heads: the key/value heads that are stored; with latent attention (MLA) one, however many
            are attended to.
        dtype: of what slots receive.
    """
    if inputs.turned and not inputs.apart:
        inputs = inputs.with_turned_queries()
        found = attend_and_observe(backend, module, inputs, scores, heads, dtype)
        return replace(found, output=hadamard(found.output))
    if inputs.pieces is not None:
        lanes = inputs.pieces.lanes
        each = [
            attend_and_observe(backend, module, one, scores, 1 if lanes.by_head else heads, dtype)
            for one in inputs.by_piece(inputs.query, inputs.query_columns)
        ]
        output = lanes.join_outputs([one.output for one in each])
        shown = [one.probabilities for one in each if one.probabilities is not None]
        if shown:
            return Observed(output, None, lanes.join(shown, 0, axis=3))
        return Observed(output, lanes.join([one.received for one in each], 0), None)
    inputs = as_autocast_has_it(inputs)
    # With latent attention (MLA) many heads read the slots of one.
    if inputs.query.shape[2] == 1:
        output, probabilities = _one_query(inputs, scores, dtype)
        if probabilities.shape[1] != heads:
            probabilities = probabilities.unflatten(1, (heads, -1)).flatten(2, 3)
        return Observed(output, None, probabilities)
    fast = fused.attention(backend, module, inputs, scores)
    output, received = block_by_block(inputs, scores, dtype) if fast is None else fast
    if received.shape[1] != heads:
        received = received.unflatten(1, (heads, -1)).sum(2)
    return Observed(output, received, None)


def scores_for(
    module: torch.nn.Module,
    inputs: Inputs,
    heads: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Scores:
    """The steps between products and outputs, from what an attention module passes.

    Args:
        module, inputs: see `attend`.
        heads: the key/value heads that are stored.
        scaling, dropout, softcap, s_aux, position_bias: what the module passes.

    Raises:
        KVPruneError: the model adds a learned bias, or it is unknown which query head reads which
            stored head.
    """
    if position_bias is not None:
        raise KVPruneError(
            "statistics are not observed for models with a learned position bias: expected "
            "position_bias=None. Use a policy without statistics, as StreamingLLM"
        )
    attended = inputs.key.shape[1]
    if heads not in (1, attended):
        raise KVPruneError(
            f"statistics: {type(module).__name__} stores {heads} key/value heads and "
            f"attends to {attended}, so it is unknown which query head reads which of them: "
            f"this family is not supported with policies that observe attention. Use a policy "
            f"without statistics, as StreamingLLM"
        )
    scaling = inputs.query.shape[-1] ** -0.5 if scaling is None else scaling
    return Scores(scaling, softcap, s_aux, dropout)


def as_autocast_has_it(inputs: Inputs) -> Inputs:
    """The dtypes that autocast gives a backend: it does not look into our kernels and `out=`."""
    dtype = autocast_dtype(inputs.query.device)
    if dtype is None or inputs.coded is not None:
        return inputs
    states = {name: getattr(inputs, name) for name in ("query", "key", "value")}
    cast = {n: t if t.dtype == torch.float64 else t.to(dtype) for n, t in states.items()}
    return replace(inputs, **cast)


def _one_query(inputs: Inputs, how: Scores, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One new token per row: all heads at once.

    Returns:
        the output `[B, 1, Hq, Dv]`, and the probabilities `[B, Hkv, G, S]`, detached.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    rows, heads, _, size = query.shape
    grouped = (query * how.scaling).reshape(rows, key.shape[1], -1, size)
    scores = how.capped(inputs.products(grouped)).to(dtype)
    if not (inputs.mask.plainly_causal and inputs.no_gaps):
        here = inputs.mask.at(inputs.query_columns, inputs.slot_columns)
        if here.shape[1] == heads:
            here = here.view(rows, key.shape[1], -1, key.shape[2])
        scores = hide(scores, here)
    sinks = None if how.sinks is None else how.sinks.view(1, key.shape[1], -1, 1).to(scores.dtype)
    probabilities = how.probabilities(scores, sinks, out=None)
    output = inputs.weighted(how.dropped(probabilities, value.dtype))
    given = probabilities.detach()
    if not inputs.no_padding:
        # Padding does not vote.
        given = given * (inputs.query_columns >= 0)[:, None, None]
    return output.view(rows, 1, heads, -1), given
