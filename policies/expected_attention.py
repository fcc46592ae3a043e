"""Expected Attention (arXiv 2510.00636): slots that queries to come will look at stay.

Queries to come are taken for normally distributed, with the mean and the covariance of the prompt's
queries before rotation, turned by the mean rotation of the `future` next positions. A slot's score
is what it may expect of them: the softmax over the slots of k mu / sqrt(D) + k Sigma k / (2 D), as
the mean over the query heads of a key/value head, times the length of the slot's value.

Where the sources differ: the first `sinks` tokens always stay, count in the budget, and neither
take part in the softmax nor in the moments, as in the paper's code (kvpress). There `epsilon`,
added before the value's length counts, is 0 alone and 0.01 under AdaKV. Moments are of the queries
of this prompt; those of a corpus (ExpectedAttentionStats) need a policy of one's own. What a layer
adds to scores (soft-capping, attention sinks) is not expected, nor are its windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvprune.errors import KVPruneError
from kvprune.policy import OneBudget, Ranking, SlotView
from kvprune.statistics import QueryMoments


@dataclass(frozen=True, repr=False)
class ExpectedAttention(OneBudget):
    """Keeps the slots that may expect most of queries to come, per key/value head, and the sinks.

    Args:
        budget: what a layer keeps in all, the sinks included; tokens (int) or a share of the prompt
            (float).
        sinks: how many of a row's first tokens stay.
        future: how many positions are looked ahead.
        epsilon: what is added to the expected probability, so that values count where it is 0.
        when: see `TokenPolicy`; by default at the end of each prompt.
        layers: the layers that the policy works on; None for all.

    Raises:
        KVPruneError: a budget that is not positive, NaN or, as a float, above 1.0; a budget in
            tokens that the sinks fill; sinks below 0, a future below 1, an epsilon below 0.
    """

    sinks: int = 4
    future: int = 512
    epsilon: float = 0.0
    when: int | str | None = field(default="prompt", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("sinks", 0), ("future", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise KVPruneError(
                    f"ExpectedAttention: {name}={value!r}: expected a number of tokens, at least "
                    f"{least}"
                )
        if isinstance(self.budget, int) and self.budget <= self.sinks:
            raise KVPruneError(
                f"ExpectedAttention: {self.budget!r} tokens: expected more tokens than the sinks "
                f"({self.sinks}), which always stay, or a share as 0.25"
            )
        number = isinstance(self.epsilon, (int, float)) and not isinstance(self.epsilon, bool)
        if not number or not 0 <= self.epsilon < math.inf:
            raise KVPruneError(
                f"ExpectedAttention: epsilon={self.epsilon!r}: expected a number of at least 0"
            )

    @property
    def statistics(self) -> tuple[QueryMoments, ...]:
        """The moments of queries."""
        return (QueryMoments(self.sinks),)

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Ranks slots by what they may expect; sinks are protected."""
        sinks = slots.oldest(self.sinks)
        expected = self._logits(slots).masked_fill(~(slots.valid & ~sinks)[:, :, None], -torch.inf)
        # Where all slots are sinks there is nothing to share.
        shares = expected.softmax(-1).nan_to_num(0).mean(2)
        lengths = torch.linalg.vector_norm(slots.values, dim=-1, dtype=shares.dtype)
        score = (shares + self.epsilon) * lengths
        return Ranking(score, sinks.expand_as(slots.valid), slots.tokens(self.budget))

    def _logits(self, slots: SlotView) -> Tensor:
        """The logarithm of each slot's expected weight, up to what all share: `[B, Hkv, G, S]`."""
        mean, covariance = slots.statistic(*self.statistics)
        keys, rotary = slots.keys.to(mean.dtype), slots.rotary
        ahead = slots.position[:, None] + torch.arange(1, self.future + 1, device=mean.device)
        turn = [part.mean(1)[:, None, None] for part in rotary.angles(ahead, mean)]
        mean = rotary.turned(mean[:, :, None], *turn)
        # Sigma's rows are turned, and then its columns.
        spread = rotary.turned(rotary.turned(covariance, *turn).mT, *turn)
        heads = keys.shape[1]
        mean = (mean * slots.scaling).unflatten(1, (heads, -1))
        spread = (spread * (slots.scaling**2 / 2)).unflatten(1, (heads, -1))
        logits = []
        # One room for all: large tensors made anew cost more than the sums.
        room = torch.empty_like(keys, memory_format=torch.contiguous_format)
        # As precise as the moments, whatever precision the model runs in.
        with torch.autocast(keys.device.type, enabled=False):
            for group in range(mean.shape[2]):
                # k mu + k Sigma k = (k Sigma + mu) k; in place, as there are many keys.
                weight = torch.matmul(keys, spread[:, :, group], out=room).add_(mean[:, :, group])
                logits.append(weight.mul_(keys).sum(-1))
        return torch.stack(logits, 2)
