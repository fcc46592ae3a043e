"""KeyDiff (arXiv 2504.15364): keys that resemble the others least stay.

The score of a slot is minus the cosine of its key and the mean of all keys of the head, each of
length 1.

Where the sources differ: the paper reads prompts block by block and evicts after each. That is
`KeyDiff(budget, when=None)` with `prefill_chunk_size` in `generate`; the default is once, at the
end of the prompt, as in kvpress.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn.functional import normalize

from kvprune.policy import OneBudget, Ranking, SlotView
from kvprune.statistics import statistic_dtype


@dataclass(frozen=True, repr=False)
class KeyDiff(OneBudget):
    """Keeps the slots whose keys are unlike the mean of all keys, per key/value head.

    Args:
        budget: what a layer keeps; tokens (int) or a share of the prompt (float).
        when: see `TokenPolicy`; by default at the end of each prompt.
        layers: the layers that the policy works on; None for all.

    Raises:
        KVPruneError: a budget that is not positive, NaN or, as a float, above 1.0.
    """

    when: int | str | None = field(default="prompt", kw_only=True)

    constant_budget = True

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Ranks slots by the angle between their keys and the mean."""
        keys = normalize(slots.keys.to(statistic_dtype(slots.keys.dtype)), dim=-1)
        # Of empty slots nothing is known: they count as 0. A mean has the sum's direction.
        total = torch.where(slots.valid[..., None], keys, 0.0).sum(2, keepdim=True)
        score = -(keys * normalize(total, dim=-1)).sum(-1)
        return Ranking(score, torch.zeros_like(slots.valid), slots.tokens(self.budget))
