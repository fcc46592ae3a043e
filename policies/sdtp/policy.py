"""SDTP: prunes hidden states during prefill by learned saliency (arXiv 2504.04514v2).

Stage s (from 1) stands before decoder layer `first_layer + every * (s - 1)` and keeps
`keep ** s` of the row's tokens; the rest never enter that layer or any deeper one. A row's
first tokens and the local share always stay, and so do the tokens whose logits are asked for.

Where the paper is silent: keep-minus-drop logit ranks; kept tokens keep their positions;
counts are per row, from the row's own valid tokens; layers count from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvprune.errors import KVPruneError
from kvprune.policy import Budget, Ranking, TokenPolicy, TokenView, newest

from .heads import SDTPHeads


@dataclass(frozen=True, repr=False)
class SDTP(TokenPolicy):
    """Learned pruning of hidden states, in stages.

    Args:
        heads: the learned modules, one per stage (`SDTPHeads.load(path)`).
        keep: the share that each stage keeps of what the stage before it kept.
        first_layer: the layer that the first stage stands before, from 0.
        every: layers from one stage to the next.
        stages: how many stages; None for as many as the model has room for.
        sinks: how many of a row's first tokens always stay.
        local: how many of the newest always stay; tokens (int, 0 for none) or a share of
            the row's tokens in this forward (float).
        min_tokens: rows with fewer tokens in a forward are left alone.
        layers: the layers it works on; None for all of its stages.

    Raises:
        KVPruneError: no heads, or a number out of range; on first use with a model also
            heads of another model and stages that do not fit.
    """

    heads: SDTPHeads | None = None
    keep: float = 0.9
    first_layer: int = 4
    every: int = 3
    stages: int | None = None
    sinks: int = 4
    local: int | float = 0.1
    min_tokens: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.heads, SDTPHeads):
            raise KVPruneError(
                f"SDTP: expected heads (SDTPHeads), came {type(self.heads).__name__}. SDTP is a "
                f"learned method: pass trained heads as SDTP(SDTPHeads.load(path)), or untrained "
                f"ones, to try it out, as SDTP(SDTPHeads(hidden_size, num_layers, stages))"
            )
        if not isinstance(self.keep, float) or not 0.0 < self.keep <= 1.0:
            raise KVPruneError(f"SDTP: keep={self.keep!r}: expected a share (a float in (0, 1])")
        Budget(self.local, "SDTP: local", least=0)
        for name, least in _LEAST.items():
            value: Any = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= least) and not (name == "stages" and value is None):
                raise KVPruneError(f"SDTP: {name}={value!r}: expected an int of at least {least}")

    def check(self, model: torch.nn.Module) -> None:
        """Refuses heads of another model, and stages that the model has no room for."""
        config: Any = model.config
        room = len(range(self.first_layer, config.num_hidden_layers, self.every))
        stages = room if self.stages is None else self.stages
        if stages > room or room == 0:
            raise KVPruneError(
                f"SDTP: stages={self.stages} do not fit: a model of {config.num_hidden_layers} "
                f"layers has room for {room} (first_layer={self.first_layer}, every={self.every})"
            )
        assert self.heads is not None
        heads_on, model_on = (next(m.parameters()).device for m in (self.heads, model))
        if heads_on != model_on:
            raise KVPruneError(
                f"SDTP: the heads are on {heads_on}, the model is on {model_on}: move them with "
                f"heads.to({str(model_on)!r})"
            )
        expected = {
            "hidden_size": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "stages": stages,
        }
        if self.heads.configuration != expected:
            raise KVPruneError(
                f"SDTP: the heads are for another model or schedule: expected {expected}, came "
                f"{self.heads.configuration}. Load the heads that were trained for this model"
            )

    def rank_hidden(self, tokens: TokenView) -> Ranking | None:
        """Ranks before each stage's layer; rows with few tokens keep everything."""
        stage, rest = divmod(tokens.layer - self.first_layer, self.every)
        assert self.heads is not None
        if rest or not 0 <= stage < len(self.heads.stages):
            return None
        if int(tokens.length.max()) < self.min_tokens:
            return None
        with torch.no_grad():
            score = self.heads(tokens.hidden, stage)[:, None]
        budget = Budget(self.keep ** (stage + 1)).of(tokens.length)
        budget = torch.where(tokens.length < self.min_tokens, tokens.length, budget)
        local = Budget(self.local, least=0).of(tokens.length)
        columns = tokens.columns[:, None]
        protected = newest(columns, local) | (columns < (tokens.first + self.sinks)[:, None, None])
        return Ranking(score, protected, budget)

    def __repr__(self) -> str:
        return super().__repr__().replace(repr(self.heads), "...", 1)


_LEAST = {"first_layer": 0, "every": 1, "stages": 1, "sinks": 0, "min_tokens": 1}
