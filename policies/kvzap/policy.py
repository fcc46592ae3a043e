"""KVzap (arXiv 2601.07891): small gates tell from a token's hidden state what KVzip+ would say.

A gate for each layer gives each key/value head a score, the logarithm of what KVzip+ measures with
a second reading. It is made when the token is written, at about a hundredth of the layer's work.

Where the sources differ:

* The paper drops what scores below a threshold, a window of 128 tokens later: that is
  `DMS(KVzap(gates, when=None), threshold=-4.0, window=128)` here. By itself the policy keeps a
  budget of the best, in each head, after the prompt.
* kvpress protects nothing where a budget is kept; here `sinks` and `recent` tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvprune.errors import KVPruneError
from kvprune.models.structure import decoder_layers
from kvprune.policy import Budget, Ranking, SlotView, TokenPolicy, split_share
from kvprune.statistics import Gate

from ..duoattention.scores import architecture
from .gates import KVzapGates

NORM = "input_layernorm"
"""What families call the norm between a layer's hidden states and its attention."""


@dataclass(frozen=True, repr=False)
class KVzap(TokenPolicy):
    """Keeps the slots that gates score best, a row's first tokens and the newest.

    Args:
        gates: `KVzapGates`, or the folder that they are in.
        budget: what each head keeps in all; tokens (int) or a share of the prompt (float).
        sinks: how many of a row's first tokens stay in any case.
        recent: how many of the newest slots stay in any case; tokens or a share.
        when: see `TokenPolicy`; by default at the end of each prompt.
        layers: the layers that the policy works on; None for all.

    Raises:
        KVPruneError: no gates there, an amount out of range; with a model, gates of another one, or
            layers without a norm in front of their attention.
    """

    gates: KVzapGates | str | PathLike[str]
    budget: int | float = 0.25
    sinks: int = 4
    recent: int | float = 16
    when: int | str | None = field(default="prompt", kw_only=True)
    _gate: Gate | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        Budget(self.budget, "KVzap: budget")
        Budget(self.recent, "KVzap: recent")
        if type(self.sinks) is not int or self.sinks < 0:
            raise KVPruneError(f"KVzap: sinks={self.sinks!r}: expected tokens, at least 0")
        gates = self.gates
        if isinstance(gates, (str, PathLike)):
            gates = KVzapGates.load(gates)
        if not isinstance(gates, KVzapGates):
            raise KVPruneError(
                f"KVzap: gates={gates!r}: expected a folder of gates, or KVzapGates, as "
                f"train_gates makes them"
            )
        object.__setattr__(self, "_gate", Gate(_GatesBehindNorms(gates)))
        if isinstance(self.gates, PathLike):
            # A spec is made of a policy's repr.
            object.__setattr__(self, "gates", fspath(self.gates))

    @property
    def statistics(self) -> tuple[Gate, ...]:
        """What the gates say."""
        assert self._gate is not None
        return (self._gate,)

    def for_model(self, model: nn.Module) -> KVzap:
        """The policy with each layer's norm in front of its gate."""
        gates = self._loaded
        here, layers = architecture(model), decoder_layers(cast(PreTrainedModel, model))
        sizes = (here["num_hidden_layers"], here["hidden_size"], here["num_key_value_heads"])
        mine = (len(gates.layers), gates.inputs, gates.heads)
        if sizes != mine or (gates.model is not None and gates.model != here):
            raise KVPruneError(
                f"KVzap: the gates are for {gates.model or mine} (layers, hidden size, key/value "
                f"heads): expected that model, got {here}. Train gates for this one: kvprune "
                f"train-gates"
            )
        norms = [getattr(layer, NORM, None) for layer in layers]
        if not all(isinstance(norm, nn.Module) for norm in norms):
            raise KVPruneError(
                f"KVzap: {type(model).__name__} has layers without {NORM}, behind which its gates "
                f"read: expected a model of another family"
            )
        twin = replace(self)
        object.__setattr__(twin, "_gate", Gate(_GatesBehindNorms(gates, norms)))
        return twin

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Ranks slots by what their gate said when they were written."""
        assert self._gate is not None
        stays = slots.oldest(self.sinks) | slots.newest(self.recent)
        return Ranking(slots.statistic(self._gate), stays, slots.tokens(self.budget))

    def with_budget(self, share: float) -> KVzap:
        """A copy with this budget."""
        (budget,) = split_share(share, self.budget)
        return replace(self, budget=budget)

    @property
    def fixed_budget(self) -> int:
        """The budget where it is given in tokens; else 0."""
        return self.budget if isinstance(self.budget, int) else 0

    def __repr__(self) -> str:
        """The policy as a call, with `...` in the place of gates, whose repr is long."""
        said = super().__repr__()
        return (
            said.replace(repr(self.gates), "...", 1) if isinstance(self.gates, nn.Module) else said
        )

    @property
    def _loaded(self) -> KVzapGates:
        assert self._gate is not None
        found: KVzapGates = self._gate.module.gates  # type: ignore[assignment]
        return found


class _GatesBehindNorms(nn.Module):
    """Gates behind the norms of a model, which are not part of them."""

    def __init__(self, gates: KVzapGates, norms: Sequence[Any] = ()) -> None:
        super().__init__()
        self.gates = gates
        # In a tuple, so that torch does not take them for its own.
        self._norms = (tuple(norms),)

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        """See `Gate`."""
        (norms,) = self._norms
        with torch.no_grad():
            states = norms[layer](hidden) if norms else hidden
            # This layer's alone: others may be elsewhere.
            gate = self.gates.layers[layer].to(states.device)
            found: Tensor = self.gates(states.to(next(gate.parameters()).dtype), layer)
            return found
