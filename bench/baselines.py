"""Ways of scoring hidden tokens that need no training, on SDTP's own schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvprune.policies import SDTP
from kvprune.policy import Ranking, TokenPolicy, TokenView


@dataclass(frozen=True, repr=False)
class Scheduled(TokenPolicy):
    """SDTP's stages, budgets and protected tokens, with other scores.

    schedule: SDTP with heads, which are not asked.
    """

    schedule: SDTP

    def rank_hidden(self, tokens: TokenView) -> Ranking | None:
        """Ranks before each stage's layer, as SDTP does."""
        heads = self.schedule.heads
        assert heads is not None
        layers = heads.layers[: self.schedule.stages]
        if tokens.layer not in layers or int(tokens.length.max()) < self.schedule.min_tokens:
            return None
        stage = layers.index(tokens.layer)
        return self.schedule.ranking(tokens, stage, self.score(tokens, stage).float())

    def score(self, tokens: TokenView, stage: int) -> Tensor:
        """`[B, Q]`, higher stays; here the newest."""
        return tokens.columns


@dataclass(frozen=True, repr=False)
class HiddenNorm(Scheduled):
    """The length of the hidden state."""

    def score(self, tokens: TokenView, stage: int) -> Tensor:
        """See `Scheduled`."""
        return tokens.hidden.float().norm(dim=-1)


@dataclass(frozen=True, repr=False)
class GivenScores(Scheduled):
    """Scores that are known beforehand, `[S, columns]`, as of an oracle or at random."""

    scores: Tensor

    def score(self, tokens: TokenView, stage: int) -> Tensor:
        """See `Scheduled`."""
        return self.scores[stage][tokens.columns.clamp(min=0)]


@dataclass(frozen=True, repr=False)
class LastQueryAttention(Scheduled):
    """What the newest tokens attend to in the layer ahead, over all heads (LazyLLM, FastKV).

    model: of the Llama family. queries: how many of the newest tokens.
    """

    model: Any
    queries: int = 16

    def score(self, tokens: TokenView, stage: int) -> Tensor:
        """See `Scheduled`; one row at a time."""
        layer = self.model.model.layers[tokens.layer]
        attention, hidden = layer.self_attn, layer.input_layernorm(tokens.hidden)
        columns = tokens.columns.clamp(min=0)
        cosine, sine = self.model.model.rotary_emb(hidden, columns)
        size = attention.head_dim
        keys = _turned(attention.k_proj(hidden).unflatten(-1, (-1, size)), cosine, sine)
        queries = _turned(attention.q_proj(hidden).unflatten(-1, (-1, size)), cosine, sine)
        queries = queries[:, -self.queries :].unflatten(2, (keys.shape[2], -1))
        weights = torch.einsum("bqhgd,bkhd->bhgqk", queries.float(), keys.float()) * size**-0.5
        later = columns[:, None, :] > columns[:, -self.queries :, None]
        weights = weights.masked_fill(later[:, None, None], -torch.inf).softmax(-1)
        return weights.sum((1, 2, 3))


def _turned(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: `[B, N, H, D]` by `[B, N, D]`."""
    half = states.shape[-1] // 2
    other = torch.cat([-states[..., half:], states[..., :half]], -1)
    return states * cosine[:, :, None] + other * sine[:, :, None]
