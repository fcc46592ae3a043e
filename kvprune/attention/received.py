"""The attention that slots receive, from queries, keys and each query's log-sum-exp.

    mass[s] = sum of exp(score(q, s) - lse[q])

over the queries q that see slot s, and over the query heads of its key/value head: the
statistic `Attention()` of a forward whose outputs another kernel computed. Everybody may see
what is not newer than itself; with a window, what is not too old either; padding sees
nothing. Nothing Q x S is ever held: on a GPU with Triton the kernels of `kernels.py` run,
anywhere else the block-wise functions here, which are the kernels' oracle.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..models.devices import without_autocast
from ..statistics import statistic_dtype

SCORES = 1 << 24
"""Scores that the functions in plain torch hold at once."""


def on_gpu(tensor: Tensor) -> bool:
    """Whether attention goes by fused kernels: on CUDA (and ROCm, which torch names so)."""
    return tensor.is_cuda


def attention_received(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    query_columns: Tensor,
    slot_columns: Tensor,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The attention that every slot receives, summed over queries and the query heads of its head.

    Args:
        query: `[B, Hq, Q, D]`.
        key: `[B, Hkv, S, D]`, of the same dtype; Hkv divides Hq.
        lse: `[B, Hq, Q]`, each query's log-sum-exp over all that it sees (attention sinks
            included, where there are some); what stands at padding is not read.
        query_columns: `[B, Q]` int64, -1 for padding, which does not vote.
        slot_columns: `[B, 1|Hkv, S]` int64, in any order, -1 where empty.
        scaling: what products are multiplied by.
        softcap: scores become `softcap * tanh(score / softcap)`.
        window: a query at column c sees the columns above `c - window`.

    Returns:
        `[B, Hkv, S]`, float32 (float64 for float64 keys), detached; 0 for an empty slot.
    """
    if _by_triton(key):
        from .kernels import attention_received as run
    else:
        run = attention_received_in_torch
    return run(query, key, lse, query_columns, slot_columns, scaling, softcap, window)


def log_sum_exp(
    query: Tensor,
    key: Tensor,
    query_columns: Tensor,
    slot_columns: Tensor,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Each query's log-sum-exp, for kernels that keep it back; see `attention_received`.

    Returns:
        `[B, Hq, Q]`, float32 (float64 for float64 keys), detached; -inf for a query that sees
        nothing, as padding.
    """
    if _by_triton(key):
        from .kernels import log_sum_exp as run
    else:
        run = log_sum_exp_in_torch
    return run(query, key, query_columns, slot_columns, scaling, softcap, window)


def _by_triton(key: Tensor) -> bool:
    return key.is_cuda and key.dtype != torch.float64 and _triton_is_there()


@cache
def _triton_is_there() -> bool:
    return find_spec("triton") is not None


@torch.no_grad()
def attention_received_in_torch(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    query_columns: Tensor,
    slot_columns: Tensor,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """`attention_received` in plain torch, block by block of queries."""
    mass = torch.zeros_like(key[..., 0], dtype=statistic_dtype(key.dtype))
    with without_autocast(key.device):
        blocks = _blocks(query, key, query_columns, slot_columns, scaling, softcap, window)
        for here, scores in blocks:
            shares = torch.exp(scores - lse[:, :, here].unflatten(1, scores.shape[1:3])[..., None])
            # Not by the exponential: who sees nothing has a log-sum-exp of -inf.
            mass += shares.masked_fill(scores == -torch.inf, 0).sum((2, 3))
    return mass


@torch.no_grad()
def log_sum_exp_in_torch(
    query: Tensor,
    key: Tensor,
    query_columns: Tensor,
    slot_columns: Tensor,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """`log_sum_exp` in plain torch, block by block of queries."""
    with without_autocast(key.device):
        blocks = _blocks(query, key, query_columns, slot_columns, scaling, softcap, window)
        return torch.cat([scores.logsumexp(-1).flatten(1, 2) for _, scores in blocks], -1)


def _blocks(
    query: Tensor,
    key: Tensor,
    query_columns: Tensor,
    slot_columns: Tensor,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of queries with their scores `[B, Hkv, G, n, S]`, -inf for what is out of sight."""
    rows, heads, count, _ = query.shape
    # The precision of half is lost in a score before the log-sum-exp is taken off.
    keys = key.to(statistic_dtype(key.dtype)).transpose(-1, -2)
    size = max(1, SCORES // max(1, rows * heads * key.shape[2]))
    for start in range(0, count, size):
        here = slice(start, min(start + size, count))
        block = query[:, :, here].to(keys.dtype).unflatten(1, (key.shape[1], -1))
        scores = (block.flatten(2, 3) @ keys).unflatten(2, block.shape[2:4]) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        sees = in_sight(query_columns[:, here], slot_columns, window)
        yield here, scores.masked_fill(~sees[:, :, None], -torch.inf)


def in_sight(query_columns: Tensor, slot_columns: Tensor, window: int | None) -> Tensor:
    """Which slots each query sees, `[B, 1|Hkv, Q, S]` bool; see `attention_received`."""
    queries, slots = query_columns[:, None, :, None], slot_columns[:, :, None]
    sees = (slots >= 0) & (slots <= queries)
    return sees if window is None else sees & (slots > queries - window)
