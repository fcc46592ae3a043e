"""R-KV (arXiv 2505.24133): long answers keep what is looked at and is not said twice.

Every so many new tokens, each head keeps the newest `window` slots, and of the others those with
the best

    balance * importance - (1 - balance) * redundancy

Importance: what the newest `window` queries give to the others (softmax over them, of the largest
logit of the head's query heads), a mean over the queries, then the largest among `kernel`
neighbours. Redundancy: the mean cosine between a slot's key and those of all slots, then a softmax
over the slots. Of the slots that are similar to a slot (a cosine above `similar`), the newest is
not counted as redundant for it: of three slots that say the same, the last one stays.

Where the sources differ:

* The paper's balance (lambda) is 0.1, its code's 0.07. 0.1 is the default here.
* Its code keeps a buffer of 128 tokens beside the budget; that is `when=128` here, so that a layer
  holds up to 127 slots more than its budget between two evictions.
* Its code computes similarities from the first row of a batch alone; here each row has its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvprune.errors import KVPruneError
from kvprune.policy import OneBudget, Ranking, SlotView, check_kernel, check_window, pooled
from kvprune.statistics import Queries, statistic_dtype

PAIRS = 1 << 22
"""Cosines that are held at once, for all rows and heads together."""


@dataclass(frozen=True, repr=False)
class RKV(OneBudget):
    """Keeps what the newest queries look at, and of similar keys the newest.

    Args:
        budget: what a head keeps in all, the window included; tokens (int) or a share of the
            prompt (float).
        balance: the part of importance, from 0.0 to 1.0; the rest is redundancy's (lambda).
        window: how many of the newest queries look, and of the newest slots stay.
        kernel: how many neighbouring slots importance is pooled over, an odd number.
        similar: the cosine above which two keys say the same, from 0.0 to 1.0.
        when: see `TokenPolicy`; by default at a prompt's end and every 128 tokens behind it.
        layers: the layers that the policy works on; None for all.

    Raises:
        KVPruneError: a budget in tokens that has no room beside the window, a window below 1, an
            even kernel, a balance or a cosine out of range; in a forward, a model that stores
            latents for keys (MLA).
    """

    budget: int | float = 1024
    balance: float = 0.1
    window: int = 8
    kernel: int = 7
    similar: float = 0.5
    when: int | str | None = field(default=128, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window, self.budget, "RKV")
        check_kernel(self.kernel, "max", "RKV")
        for name in ("balance", "similar"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1:
                raise KVPruneError(f"RKV: {name}={value!r}: expected a number from 0.0 to 1.0")

    @property
    def statistics(self) -> tuple[Queries, ...]:
        """The newest queries."""
        return (Queries(self.window),)

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Ranks slots by importance and redundancy; the window is protected."""
        window = slots.newest(self.window)
        keys = slots.keys.to(statistic_dtype(slots.keys.dtype))
        importance = self._importance(slots, keys, slots.valid & ~window)
        redundancy = self._redundancy(slots, keys)
        score = self.balance * importance - (1 - self.balance) * redundancy
        return Ranking(score, window, slots.tokens(self.budget))

    def _importance(self, slots: SlotView, keys: Tensor, others: Tensor) -> Tensor:
        """`[B, Hkv, S]`, 0 where nobody looks."""
        queries, columns = slots.statistic(Queries(self.window))
        if queries.shape[-1] != keys.shape[-1]:
            raise KVPruneError(
                f"{self!r}: keys of {keys.shape[-1]} numbers and queries of {queries.shape[-1]}, "
                f"as where heads share a latent (MLA): expected a model that stores keys. Use "
                f"SnapKV there"
            )
        queries = queries.to(keys.dtype).unflatten(1, (slots.heads, -1)) * slots.scaling
        logits = (queries @ keys[:, :, None].transpose(-1, -2)).amax(2)
        before = slots.columns[:, :, None] <= columns[:, None, :, None]
        given = logits.masked_fill(~(others[:, :, None] & before), -torch.inf).softmax(-1)
        # A query that a row does not have, or that sees no others, gives nothing.
        given = given.nan_to_num(0.0).sum(2) / (columns >= 0).sum(-1).clamp(min=1)[:, None, None]
        found = pooled(given[:, :, None], slots.order, others, self.kernel, "max")[:, :, 0]
        # A slot without a candidate beside it has -inf.
        return found.clamp(min=0)

    def _redundancy(self, slots: SlotView, keys: Tensor) -> Tensor:
        """`[B, Hkv, S]`, block by block of slots."""
        rows, heads, size, _ = keys.shape
        order = slots.order.expand(-1, heads, -1)
        index = order[..., None].expand_as(keys)
        valid = slots.valid.expand(-1, heads, -1).gather(-1, order)
        # In order, so that the newest similar slot is the last one; what is empty is like nothing.
        unit = torch.nn.functional.normalize(keys.gather(2, index), dim=-1) * valid[..., None]
        total = torch.zeros_like(unit[..., 0])
        places = torch.arange(1, size + 1, device=keys.device, dtype=keys.dtype)
        step = max(1, PAIRS // (rows * heads * size))
        for start in range(0, size, step):
            cosines = unit[:, :, start : start + step] @ unit.transpose(-1, -2)
            # Nothing is like itself; 0 is what an empty slot has, too, and never above `similar`.
            cosines.diagonal(start, -2, -1).zero_()
            newest, at = ((cosines > self.similar) * places).max(-1, keepdim=True)
            there = newest > 0
            cosines.scatter_(-1, at, cosines.gather(-1, at).masked_fill(there, 0))
            total += cosines.sum(2)
        mean = total / valid.sum(-1, keepdim=True).clamp(min=1)
        found = mean.masked_fill(~valid, -torch.inf).softmax(-1).nan_to_num(0.0)
        return torch.empty_like(found).scatter(-1, order, found)
