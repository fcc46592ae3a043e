"""Measures how far heads look: the attention that a streaming head would not have paid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvprune.cache.composed import ComposedCache
from kvprune.errors import KVPruneError
from kvprune.statistics import Block, Statistic

from .scores import HeadScores, architecture


@dataclass(frozen=True)
class FarAttention(Statistic):
    """The attention that a slot receives from queries that would not see it in a streaming head.

    sinks: a row's first tokens, which every query sees.
    recent: so many of the newest tokens are seen, the query's own included.
    """

    sinks: int
    recent: int

    reads = "probabilities"
    adds = False

    def join(self, held: Tensor, new: Block) -> Tensor:
        """Adds up a block's far probabilities, `[B, Hkv, S]`."""
        slots, queries = new.slots[:, :, None], new.columns[:, None, :, None]
        far = (slots >= self.sinks) & (slots <= queries - self.recent)
        return held + (new.probabilities.sum(2) * far).sum(2)


@torch.no_grad()
def head_scores(model: Any, ids: Tensor, sinks: int = 64, recent: int = 256) -> HeadScores:
    """How far each key/value head of a model looks, on a text.

    Args:
        model: attached.
        ids: `[1, Q]`, the text's tokens, without padding.
        sinks: how many of a row's first tokens a streaming head keeps.
        recent: how many of the newest it keeps.

    Returns:
        by layer and head, the share of attention that goes to tokens which a streaming head has
        dropped, a mean over the queries that have such tokens and over the query heads of a
        key/value head.

    Raises:
        KVPruneError: more than one row, or a text in which nothing is far.
    """
    asking = ids.shape[-1] - sinks - recent
    if ids.shape[0] != 1 or asking < 1:
        raise KVPruneError(
            f"head_scores: expected one text of more than {sinks + recent} tokens (sinks and "
            f"recent), got ids of shape {list(ids.shape)}"
        )
    far = FarAttention(sinks, recent)
    cache = ComposedCache(observe=(far,))
    model(ids, past_key_values=cache, logits_to_keep=1)
    facts = architecture(model)
    heads = facts["num_key_value_heads"]
    # A layer without slots, as of linear attention, has no heads that could stream.
    scores = torch.full((facts["num_hidden_layers"], heads), torch.inf)
    for index, layer in cache.slot_layers():
        received = layer.statistics[far][0].sum(-1)
        scores[index] = (received / (asking * facts["num_attention_heads"] // heads)).float().cpu()
    return HeadScores(scores, facts)
