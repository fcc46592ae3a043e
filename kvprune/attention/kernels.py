"""The functions of `received.py` as Triton kernels. Imported only where they run.

Each program owns what it writes and sums in a fixed order, without atomics, so results are
the same in every run. Blocks of slots and queries that cannot see each other are skipped;
that is read off their columns, since slots come in no order. Scores are float32.

Tested with `TRITON_INTERPRET=1` on CPU; not yet run on a GPU, so that the block sizes are
chosen to fit, not tuned.
"""

# Annotations stay objects here: Triton looks for `tl.constexpr` in them.

import torch
import triton
import triton.language as tl
from torch import Tensor

FAR = tl.constexpr(1 << 62)
"""Newer than every column."""

LOWEST = tl.constexpr(-1.0e38)
"""Below every score, and finite, so that differences are."""

BYTES = 16384
"""A block of keys or queries takes at most this much of a processor's shared memory."""


@triton.jit
def _columns(pointer, places, stride, there):  # type: ignore[no-untyped-def]
    """Columns at some places, and the oldest and newest of them."""
    columns = tl.load(pointer + places.to(tl.int64) * stride, mask=there, other=-1)
    return columns, tl.min(tl.where(columns >= 0, columns, FAR)), tl.max(columns)


@triton.jit
def _vectors(pointer, places, stride, there, size, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys or queries `[places, BLOCK_D]`; heads are padded with zeros, which add nothing."""
    depth = tl.arange(0, BLOCK_D)
    where = pointer + places.to(tl.int64)[:, None] * stride + depth[None, :]
    return tl.load(where, mask=there[:, None] & (depth < size)[None, :], other=0.0)


@triton.jit
def _scores(q, k, queries, slots, scaling, softcap, window, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores `[queries, slots]`, -inf for what is out of sight."""
    # Not TF32, which is too coarse for what is subtracted from a log-sum-exp.
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    if CAPPED:
        # tanh, without overflow at either end.
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
    old = slots[None, :] <= queries[:, None]
    near = slots[None, :] > queries[:, None] - window
    return tl.where((slots >= 0)[None, :] & old & near, scores, float("-inf"))


@triton.jit
def _mass_kernel(  # type: ignore[no-untyped-def]
    query, key, lse, query_columns, slot_columns, mass,
    query_row, query_head, query_place, key_row, key_head, key_place,
    lse_row, lse_head, lse_place, queries_row, queries_place,
    slots_row, slots_head, slots_place, mass_row, mass_head,
    count, held, groups, size, scaling, softcap, window,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of slots of one row and key/value head: every query that sees any of them."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = places < held
    slot_columns += row * slots_row + head * slots_head
    slots, oldest, newest = _columns(slot_columns, places, slots_place, there)
    key += row * key_row + head * key_head
    k = _vectors(key, places, key_place, there, size, BLOCK_D)
    query_columns += row * queries_row
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        asks = start + tl.arange(0, BLOCK)
        valid = asks < count
        queries, first, last = _columns(query_columns, asks, queries_place, valid)
        if (last >= oldest) & (newest > first - window):
            for group in range(groups):
                mine = head * groups + group
                asking = query + row * query_row + mine * query_head
                q = _vectors(asking, asks, query_place, valid, size, BLOCK_D)
                scores = _scores(q, k, queries, slots, scaling, softcap, window, CAPPED)
                theirs = lse + row * lse_row + mine * lse_head + asks.to(tl.int64) * lse_place
                taken = tl.load(theirs, mask=valid, other=0.0)
                # Not by the exponential: who sees nothing has a log-sum-exp of -inf.
                sees = scores > float("-inf")
                shares = tl.where(sees, tl.exp(scores - taken[:, None]), 0.0)
                total += tl.sum(shares, 0)
    tl.store(mass + row * mass_row + head * mass_head + places, total, mask=there)


@triton.jit
def _lse_kernel(  # type: ignore[no-untyped-def]
    query, key, query_columns, slot_columns, lse,
    query_row, query_head, query_place, key_row, key_head, key_place,
    queries_row, queries_place, slots_row, slots_head, slots_place, lse_row, lse_head,
    count, held, groups, size, scaling, softcap, window,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of queries of one row and query head: every slot that any of them sees."""
    row, mine = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = mine // groups
    asks = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = asks < count
    queries, first, last = _columns(query_columns + row * queries_row, asks, queries_place, valid)
    query += row * query_row + mine * query_head
    q = _vectors(query, asks, query_place, valid, size, BLOCK_D)
    slot_columns += row * slots_row + head * slots_head
    key += row * key_row + head * key_head
    peak, total = tl.full([BLOCK], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, held, BLOCK):
        places = start + tl.arange(0, BLOCK)
        there = places < held
        slots, oldest, newest = _columns(slot_columns, places, slots_place, there)
        if (last >= oldest) & (newest > first - window):
            k = _vectors(key, places, key_place, there, size, BLOCK_D)
            scores = _scores(q, k, queries, slots, scaling, softcap, window, CAPPED)
            higher = tl.maximum(peak, tl.max(scores, 1))
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)
            peak = higher
    tl.store(lse + row * lse_row + mine * lse_head + asks, peak + tl.log(total), mask=valid)


@torch.no_grad()
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
    """See `received.attention_received`; float32, float16 or bfloat16."""
    query, key = _dense(query), _dense(key)
    rows, heads, held, size = key.shape
    slot_columns = slot_columns.expand(-1, heads, -1)
    mass = key.new_empty((rows, heads, held), dtype=torch.float32)
    block, block_d = _blocks(key)
    with torch.cuda.device_of(key):
        _mass_kernel[(triton.cdiv(held, block), heads, rows)](
            query, key, lse, query_columns, slot_columns, mass,
            *query.stride()[:3], *key.stride()[:3], *lse.stride(), *query_columns.stride(),
            *slot_columns.stride(), *mass.stride()[:2],
            query.shape[2], held, query.shape[1] // heads, size, *_rule(scaling, softcap, window),
            CAPPED=softcap is not None, BLOCK=block, BLOCK_D=block_d, num_stages=2,
        )  # fmt: skip
    return mass


@torch.no_grad()
def log_sum_exp(
    query: Tensor,
    key: Tensor,
    query_columns: Tensor,
    slot_columns: Tensor,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """See `received.log_sum_exp`; float32, float16 or bfloat16."""
    query, key = _dense(query), _dense(key)
    rows, heads, count, size = query.shape
    slot_columns = slot_columns.expand(-1, key.shape[1], -1)
    lse = query.new_empty((rows, heads, count), dtype=torch.float32)
    block, block_d = _blocks(key)
    with torch.cuda.device_of(key):
        _lse_kernel[(triton.cdiv(count, block), heads, rows)](
            query, key, query_columns, slot_columns, lse,
            *query.stride()[:3], *key.stride()[:3], *query_columns.stride(),
            *slot_columns.stride(), *lse.stride()[:2],
            count, key.shape[2], heads // key.shape[1], size, *_rule(scaling, softcap, window),
            CAPPED=softcap is not None, BLOCK=block, BLOCK_D=block_d, num_stages=2,
        )  # fmt: skip
    return lse


def _dense(vectors: Tensor) -> Tensor:
    """With neighbouring entries of a vector next to each other, as the kernels read them."""
    return vectors if vectors.stride(-1) == 1 else vectors.contiguous()


def _rule(scaling: float, softcap: float | None, window: int | None) -> tuple[float, float, int]:
    """Cap and window as numbers; None means no cap, and a window without end."""
    return scaling, 1.0 if softcap is None else softcap, FAR.value if window is None else window


def _blocks(key: Tensor) -> tuple[int, int]:
    """Queries and slots of a block, and the head size rounded up to what `tl.dot` takes."""
    depth = max(16, triton.next_power_of_2(key.shape[-1]))
    return max(16, min(64, BYTES // (depth * key.element_size()))), depth
