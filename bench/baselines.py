"""Ways of scoring hidden tokens that need no training, on SDTP's own schedule."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from kvprune.policies import SDTP
from kvprune.policy import TokenView


@dataclass(frozen=True, repr=False)
class Newest(SDTP):
    """Scores tokens by column: the newest stay."""

    def score(self, tokens: TokenView, stage: int) -> Tensor:
        """See `SDTP.score`."""
        return tokens.columns.float()


@dataclass(frozen=True, repr=False)
class HiddenNorm(SDTP):
    """Scores tokens by the length of their hidden state."""

    def score(self, tokens: TokenView, stage: int) -> Tensor:
        """See `SDTP.score`."""
        return tokens.hidden.float().norm(dim=-1)


@dataclass(frozen=True, repr=False)
class GivenScores(SDTP):
    """Scores of a prompt's tokens that are known beforehand, from an oracle or at random.

    Tokens behind the prompt get the score 0: the logits of all of them are asked for, so all stay.

    Args:
        scores: `[S, columns]`, by stage.
    """

    scores: Tensor = field(kw_only=True)

    def score(self, tokens: TokenView, stage: int) -> Tensor:
        """See `SDTP.score`."""
        scores = self.scores[stage]
        behind = tokens.columns >= len(scores)
        return scores[tokens.columns.clamp(0, len(scores) - 1)].float().masked_fill(behind, 0)


@dataclass(frozen=True, repr=False)
class LastQueryAttention(SDTP):
    """Scores tokens by the attention of the newest in the layer ahead, all heads (LazyLLM, FastKV).

    Args:
        model: a model of the Llama family.
        queries: how many of the newest tokens attend.
    """

    model: Any = field(kw_only=True)
    queries: int = field(default=16, kw_only=True)

    def score(self, tokens: TokenView, stage: int) -> Tensor:
        """See `SDTP.score`; one row at a time."""
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


def scheduled(kind: type[SDTP], plan: SDTP, **more: Any) -> SDTP:
    """A policy of class `kind` with the schedule of `plan`, whose heads are not asked."""
    return kind(**{f.name: getattr(plan, f.name) for f in fields(plan)}, **more)


def _turned(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The states `[B, N, H, D]`, rotated by the cosine and sine `[B, N, D]` of their positions."""
    half = states.shape[-1] // 2
    other = torch.cat([-states[..., half:], states[..., :half]], -1)
    return states * cosine[:, :, None] + other * sine[:, :, None]
