"""SDTP: prunes hidden states during prefill by learned saliency (arXiv 2504.04514v2).

Stage s (from 1) stands before decoder layer `first_layer + every * (s - 1)` of its heads and
keeps `keep ** s` of the row's tokens; the other tokens enter neither that layer nor any deeper
one. A row's first tokens and its newest tokens, the local share, always stay, and so do the tokens
whose logits are asked for.

Where the paper is silent: tokens are ranked by the keep-minus-drop logit; kept tokens keep their
positions; counts are per row, from the row's own valid tokens; layers count from 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from kvprune.errors import KVPruneError
from kvprune.models.devices import device_of, devices_of
from kvprune.policy import Budget, Ranking, TokenPolicy, TokenView

from .heads import SDTPHeads, check_keep
from .shipped import heads_for, heads_in


@dataclass(frozen=True, repr=False)
class SDTP(TokenPolicy):
    """Learned pruning of hidden states, in stages.

    Args:
        heads: the learned modules (`SDTPHeads.from_pretrained(folder)`), or the name of their
            folder; None for the heads that ship with kvprune, if there are any for the model. A
            folder, like heads that ship, is read on first use, in float32 and onto the model's
            device.
        keep: the share that each stage keeps of the tokens that the stage before it kept; None
            for the share that the heads were trained for.
        stages: how many of the heads' stages to use, the first ones; None for all. The paper's
            SDTP-low is `stages=5`.
        sinks: how many of a row's first tokens always stay.
        local: how many of the newest tokens always stay; tokens (int, 0 for none) or a share of
            the row's tokens in this forward (float).
        min_tokens: rows with fewer tokens in a forward are left alone.
        layers: the layers that the policy works on; None for all of its stages.

    Raises:
        KVPruneError: a number out of range. On first use with a model also: no heads for that
            model, heads of another model, or heads on a device that the model is not on. (On a
            model over several devices the heads follow the tokens.)
    """

    heads: SDTPHeads | str | PathLike[str] | None = None
    keep: float | None = None
    stages: int | None = None
    sinks: int = 4
    local: int | float = 0.1
    min_tokens: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.heads, PathLike):
            # As a text, which a spec can hold.
            object.__setattr__(self, "heads", fspath(self.heads))
        if not isinstance(self.heads, SDTPHeads | str | None):
            raise KVPruneError(
                f"SDTP: heads: expected SDTPHeads, as SDTPHeads.from_pretrained(folder), such a "
                f"folder's name, or None for those that ship with kvprune, got {self.heads!r}"
            )
        if self.keep is not None:
            check_keep(self.keep, "SDTP")
        Budget(self.local, "SDTP: local", least=0)
        for name, least in _LEAST.items():
            value: Any = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= least) and not (name == "stages" and value is None):
                raise KVPruneError(f"SDTP: {name}={value!r}: expected an int of at least {least}")

    def for_model(self, model: torch.nn.Module) -> SDTP:
        """The policy with its heads; refuses heads of another model or with too few stages."""
        policy = self
        if self.heads is None:
            policy = replace(self, heads=heads_for(model))
        elif isinstance(self.heads, str):
            policy = replace(self, heads=heads_in(self.heads, model))
        policy._check_heads(model)
        return policy

    def _check_heads(self, model: Any) -> None:
        heads, config = self._with_heads(), model.config.get_text_config(decoder=True)
        heads_on, model_on = next(heads.parameters()).device, devices_of(model)
        if heads_on not in model_on:
            raise KVPruneError(
                f"SDTP: the heads are on {heads_on}, the model is on "
                f"{', '.join(sorted(map(str, model_on)))}: move them with "
                f"heads.to({str(device_of(model))!r})"
            )
        of_model = {
            "hidden_size": config.hidden_size,
            # The config of a decoder that was part of an encoder-decoder model has the encoder's
            # number of layers under the usual name.
            "num_layers": getattr(config, "decoder_layers", config.num_hidden_layers),
        }
        of_heads = {name: heads.configuration[name] for name in of_model}
        if of_heads != of_model:
            raise KVPruneError(
                f"SDTP: the heads are for another model: expected {of_model}, got {of_heads}. "
                f"Load the heads that were trained for this model"
            )
        if self.stages is not None and self.stages > len(heads.stages):
            raise KVPruneError(
                f"SDTP: stages={self.stages}: the heads have {len(heads.stages)}; expected no more"
            )

    def rank_hidden(self, tokens: TokenView) -> Ranking | None:
        """Ranks tokens before each stage's layer; rows with few tokens keep everything."""
        stage = self.stage_of(tokens.layer)
        if stage is None or int(tokens.length.max()) < self.min_tokens:
            return None
        return self.ranking(tokens, stage, self.score(tokens, stage))

    def stage_of(self, layer: int) -> int | None:
        """The number of the stage that stands before a layer, from 0; None if there is no stage."""
        layers = self._with_heads().layers[: self.stages]
        return layers.index(layer) if layer in layers else None

    @torch.no_grad()
    def score(self, tokens: TokenView, stage: int) -> Tensor:
        """The heads' scores of a stage's tokens, `[B, Q]`; higher stays.

        A subclass that overrides this method has SDTP's stages, budgets and protected tokens.
        """
        heads = self._with_heads().on(tokens.hidden.device)
        scores: Tensor = heads(tokens.hidden, tokens.columns, stage)
        return scores

    def ranking(self, tokens: TokenView, stage: int, score: Tensor) -> Ranking:
        """The ranking of a stage's tokens by any scores `[B, Q]`, on SDTP's schedule."""
        budget = tokens.tokens(self.share ** (stage + 1))
        # Rows with few tokens keep everything.
        budget = torch.where(tokens.length < self.min_tokens, tokens.length, budget)
        sinks = tokens.oldest(self.sinks)
        protected = tokens.newest(self.local) | sinks
        return Ranking(score[:, None], protected, budget)

    @property
    def share(self) -> float:
        """The share that each stage keeps of the tokens that the stage before it kept."""
        return self._with_heads().keep if self.keep is None else self.keep

    def _with_heads(self) -> SDTPHeads:
        if not isinstance(self.heads, SDTPHeads):
            raise KVPruneError("SDTP: no heads yet: expected for_model(model) to be called first")
        return self.heads

    def __repr__(self) -> str:
        """The policy as a call, with `...` in the place of heads, whose repr is long."""
        return (
            super().__repr__().replace(repr(self.heads), "...", 1)
            if isinstance(self.heads, SDTPHeads)
            else super().__repr__()
        )


_LEAST = {"stages": 1, "sinks": 0, "min_tokens": 1}
