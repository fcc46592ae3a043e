"""ChunkKV (arXiv 2502.00299): whole chunks of neighbouring tokens stay, by another policy's scores.

A row's tokens are cut into chunks of `size`, from its first token on. A chunk's score in a head is
the mean of its slots' scores. The best chunks stay as wholes, as long as they fit into the budget.

What the policy within protects, as SnapKV's window, stays in any case, and is no part of a chunk.
Where not even the best chunk fits, its best slots stay, so that no head is left with nothing.

Where the sources differ: the paper's code sums up the scores of a chunk, which is the same order
for whole chunks; kvpress adds up the heads of a layer, so that all keep the same chunks, counts the
window as part of the last ones, and rounds the number of chunks, so that a budget may be exceeded.
Here each head keeps its own chunks, a budget is an upper bound, and up to `size - 1` slots of it
are not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune.errors import KVPruneError
from kvprune.policy import Around, Ranking, SlotView, select


@dataclass(frozen=True, repr=False)
class ChunkKV(Around):
    """Keeps whole chunks of tokens, the best by the mean of their slots' scores.

    Args:
        base: the policy that scores slots, as SnapKV(0.25).
        size: tokens of a chunk.

    Raises:
        KVPruneError: a size below 1, or a base that ranks no slots.
    """

    size: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.size) is not int or self.size < 1:
            raise KVPruneError(
                f"ChunkKV: size={self.size!r}: expected tokens, an int of at least 1"
            )

    def rerank(self, slots: SlotView, ranking: Ranking) -> Ranking:
        """Protects the slots of the chunks that fit into the budget."""
        budget = ranking.budget.reshape(len(ranking.budget), -1, 1)
        known = (slots.columns, ranking.score, ranking.protected, budget)
        shape = (-1, max(tensor.shape[1] for tensor in known), -1)
        columns, valid = slots.columns.expand(shape), slots.valid.expand(shape)
        protected = valid & ranking.protected
        free = valid & ~protected
        room = (budget - protected.sum(-1, keepdim=True)).clamp(min=0)
        # Sums by chunk, [B, H, chunks]; an empty slot adds nothing to the first one.
        chunk = (slots.positions // self.size).clamp(min=0).expand(shape)
        nothing = ranking.score.new_zeros((*chunk.shape[:2], int(chunk.amax()) + 1))
        score = ranking.score.expand(shape)
        total = nothing.scatter_add(-1, chunk, score.masked_fill(~free, 0))
        members = nothing.scatter_add(-1, chunk, free.to(nothing.dtype))
        mean = (total / members).masked_fill(members == 0, -torch.inf)
        # From the best to the worst, ties from the newer one on.
        order = nothing.shape[-1] - 1 - mean.flip(-1).argsort(dim=-1, descending=True, stable=True)
        fits = members.gather(-1, order).cumsum(-1) <= room
        stays = torch.zeros_like(fits).scatter(-1, order, fits).gather(-1, chunk) & free
        first = free & (chunk == order[..., :1])
        some = Ranking(score, torch.zeros_like(free), room[..., 0])
        stays |= ~fits[..., :1] & select(some, columns, first)
        # No room beyond these: the budget is raised to what is protected.
        return Ranking(ranking.score, protected | stays, torch.zeros_like(budget[..., 0]))
