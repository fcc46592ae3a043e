"""Random queries, keys and columns, and what slots receive of them by the n x n softmax."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Arguments of `kvprune.attention.received`, as there."""

    query: Tensor
    key: Tensor
    query_columns: Tensor
    slot_columns: Tensor
    softcap: float | None = None
    window: int | None = None

    def arguments(self) -> tuple[Any, ...]:
        """Those of `log_sum_exp`."""
        columns = (self.query_columns, self.slot_columns)
        return (self.query, self.key, *columns, 0.3, self.softcap, self.window)

    def with_lse(self, lse: Tensor) -> tuple[Any, ...]:
        """The arguments of `attention_received`."""
        query, key, *rest = self.arguments()
        return (query, key, lse, *rest)

    def to(self, target: Any) -> Case:
        """Vectors of another dtype, or everything on another device."""
        if isinstance(target, torch.dtype):
            return replace(self, query=self.query.to(target), key=self.key.to(target))
        moved: dict[str, Any] = {
            n: v.to(target) for n, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **moved)

    def naive(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp `[B, Hq, Q]` and mass `[B, Hkv, S]`, in float64 and all at once."""
        groups = self.query.shape[1] // self.key.shape[1]
        keys = self.key.double().repeat_interleave(groups, 1)
        scores = 0.3 * self.query.double() @ keys.transpose(-1, -2)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        q, s = self.query_columns[:, None, :, None], self.slot_columns[:, :, None, :]
        sees = (s >= 0) & (s <= q) & (s > q - (self.window or 1 << 40))
        sees = sees.expand(-1, self.key.shape[1], -1, -1).repeat_interleave(groups, 1)
        lse = scores.masked_fill(~sees, -torch.inf).logsumexp(-1)
        shares = torch.softmax(scores.masked_fill(~sees, -torch.inf), -1).nan_to_num()
        return lse, shares.sum(2).unflatten(1, (-1, groups)).sum(2)


def case(
    rows: int = 2,
    heads: tuple[int, int] = (4, 2),
    old: int = 37,
    new: int = 70,
    size: int = 24,
    softcap: float | None = None,
    window: int | None = None,
    per_head: bool = True,
    seed: int = 0,
) -> Case:
    """A second turn: old slots in no order, with holes; new ones; a row that begins in padding."""
    g = torch.Generator().manual_seed(seed)

    def draw(count: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, count, size, generator=g, dtype=torch.float64)

    slot_heads = heads[1] if per_head else 1
    seen = 2 * old
    queries = torch.arange(seen, seen + new).repeat(rows, 1)
    queries[-1, : new // 5] = -1
    shuffled = torch.stack([torch.randperm(seen, generator=g) for _ in range(rows * slot_heads)])
    slots = shuffled[:, :old].view(rows, slot_heads, old)
    slots = slots.masked_fill(torch.rand(slots.shape, generator=g) < 0.2, -1)
    slots = torch.cat([slots, queries[:, None].expand(-1, slot_heads, -1)], -1)
    query, key = 2 * draw(new, heads[0]), draw(old + new, heads[1])
    return Case(query, key, queries, slots, softcap, window)


CASES: dict[str, dict[str, Any]] = {
    "second turn": {},
    "first turn": {"old": 0},
    "one beyond a block": {"old": 0, "new": 65, "rows": 1},
    "one query": {"new": 1, "rows": 1},
    "mha": {"heads": (3, 3), "per_head": False},
    "mqa": {"heads": (4, 1), "size": 16},
    "softcap": {"softcap": 1.5},
    "window": {"window": 9},
    "window, softcap": {"window": 40, "softcap": 3.0, "old": 80},
    "window of one": {"window": 1},
    "odd": {"size": 5, "old": 1, "new": 3, "rows": 3},
}
