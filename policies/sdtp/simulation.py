"""The pruning pass of SDTP's training: simulates pruning by attention masks, with gradients.

No token leaves the model, so shapes stay; from the stage on that drops a token, no query attends
to that token (paper, section 3.3, as DynamicViT does). The policy's schedule and the engine's
selection decide which tokens are dropped, as in inference, but on scores with Gumbel noise. The
backward pass takes each decision for its straight-through relaxation, so that a head learns
from the tokens that it dropped as well as from those that it kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.attention.masks import biased_mask
from kvprune.models.structure import argument, decoder_layers, with_argument
from kvprune.policy import Lengths, TokenView
from kvprune.policy.selection import select
from kvprune.policy.views import Statistics

from .heads import SDTPHeads
from .policy import SDTP

LEAK = 1e-5
"""The weight that a dropped token still has in attention, so that its gate has a gradient.

The inverse of this weight bounds that gradient: at 1e-8 single tokens drowned all others.
"""


@dataclass
class PruningPass:
    """One row's way through the stages.

    Args:
        policy: the policy, with heads, which get the gradients.
        prompt: how many tokens can be pruned, the first ones; tokens behind them always stay.
        temperature: the temperature of the noise and of the relaxation; 0 for no noise, as in
            inference.
        generator: the random generator of the noise.

    Attributes:
        stages: the stages that were met.
        columns: for each stage, the `[n]` columns of the tokens that came to it.
        scores: for each stage, the scores of these tokens, with gradients.
        free: for each stage, `[n]` bool, which of these tokens could have been dropped.
        kept: for each stage, `[n]` bool, which of these tokens went on.
        gate: `[prompt]`, 1 for tokens that were kept so far, 0 for others; None before any stage.
    """

    policy: SDTP
    prompt: int
    temperature: float
    generator: torch.Generator | None = None
    stages: list[int] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    free: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    gate: Tensor | None = None
    _masks: dict[int, tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    def enter(self, layer: int, num_layers: int, hidden: Tensor) -> None:
        """Decides which tokens go on, if a stage stands before `layer`; `hidden` is `[1, N, C]`."""
        stage = self.policy.stage_of(layer)
        if stage is None or not self.policy.applies(layer):
            return
        tokens = self._view(layer, num_layers, hidden.detach())
        # Heads are not under autocast, as they are not in inference.
        with torch.autocast(hidden.device.type, enabled=False):
            self._decide(stage, tokens)

    def _decide(self, stage: int, tokens: TokenView) -> None:
        assert isinstance(self.policy.heads, SDTPHeads)
        score = self.policy.heads(tokens.hidden, tokens.columns, stage)
        noisy = score + self._noise(score)
        ranking = self.policy.ranking(tokens, stage, noisy.detach())
        # The logits of the prompt's last token are asked for, so it is protected.
        asked = tokens.columns[:, None] == self.prompt - 1
        ranking = replace(ranking, protected=ranking.protected | asked)
        kept = select(ranking, tokens.columns[:, None], tokens.valid[:, None])[0, 0]
        gate = _gate(noisy[0], kept, ranking.protected[0, 0], self.temperature)
        self._close(tokens.columns[0], gate)
        self.stages.append(stage)
        self.columns.append(tokens.columns[0])
        self.scores.append(score[0])
        self.free.append(~ranking.protected[0, 0])
        self.kept.append(kept)

    def _view(self, layer: int, num_layers: int, hidden: Tensor) -> TokenView:
        """The view of the prompt's tokens that are left."""
        columns = torch.arange(self.prompt, device=hidden.device)
        if self.kept:
            columns = self.columns[-1][self.kept[-1]]
        columns = columns[None]
        return TokenView(
            layer=layer,
            num_layers=num_layers,
            hidden=hidden[:, columns[0]],
            columns=columns,
            valid=columns >= 0,
            first=columns.new_zeros(1),
            lengths=Lengths(columns.new_full((1,), self.prompt)),
            statistic=Statistics({}),
        )

    def _noise(self, score: Tensor) -> Tensor:
        """The noise on scores: the temperature times the difference of two Gumbel variables.

        One variable is of keeping a token, the other of dropping it.
        """
        if self.temperature == 0:
            return torch.zeros_like(score)
        # The logit of a uniform variable has the distribution of that difference.
        uniform = torch.rand(score.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)
        return self.temperature * uniform.logit().to(score)

    def _close(self, columns: Tensor, gate: Tensor) -> None:
        """Multiplies `gate` into the gates of the tokens at `columns`.

        A token that was dropped before stays dropped, with its gradient.
        """
        self._masks = {}
        before = gate.new_ones(self.prompt) if self.gate is None else self.gate
        self.gate = before * torch.ones_like(before).index_copy(0, columns, gate)

    def mask(self, hidden: Tensor, mask: Tensor | None) -> Tensor | None:
        """A layer's own mask with dropped tokens hidden; unchanged before the first stage."""
        if self.gate is None:
            return mask
        # The layers behind a stage share masks: one for each mask that the model made.
        if id(mask) not in self._masks:
            self._masks[id(mask)] = (mask, self._gated(hidden, mask))
        return self._masks[id(mask)][1]

    def _gated(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        assert self.gate is not None
        return biased_mask(hidden, mask, (self.gate.clamp(min=0) + LEAK).log())


def _gate(noisy: Tensor, kept: Tensor, protected: Tensor, temperature: float) -> Tensor:
    """Gates `[n]`, 1 for kept and 0 for dropped tokens; their gradient is the Gumbel-softmax's."""
    chosen = kept & ~protected
    # No token stayed for its score, or none was dropped: there is no decision to learn from.
    if not bool(chosen.any()) or bool(kept.all()):
        return kept.to(noisy.dtype)
    # The schedule cuts at the least score that stayed.
    edge = noisy.detach()[chosen].min()
    soft = torch.sigmoid((noisy - edge) / (temperature or 1.0))
    return torch.where(protected, 1.0, kept.to(noisy.dtype) + soft - soft.detach())


@contextmanager
def simulated(model: Any, run: PruningPass) -> Iterator[PruningPass]:
    """Prunes, by `run`, one forward of `model` inside the context, with one row and no cache."""
    layers = decoder_layers(model.base_model)
    handles = [
        layer.register_forward_pre_hook(
            partial(_before_layer, run, index, len(layers)), with_kwargs=True
        )
        for index, layer in enumerate(layers)
    ]
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def _before_layer(
    run: PruningPass,
    index: int,
    count: int,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    hidden = argument(layer, args, kwargs, "hidden_states")
    run.enter(index, count, hidden)
    mask = run.mask(hidden, argument(layer, args, kwargs, "attention_mask"))
    return with_argument(layer, args, kwargs, "attention_mask", mask)
