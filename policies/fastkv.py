"""FastKV's token-selective propagation (arXiv 2502.01068): the later layers read fewer tokens.

Before one decoder layer, tokens are ranked by what the newest queries of the layer before give
them: the probabilities of the `window` newest queries, added up and pooled over neighbouring
tokens, as the sum over all query heads. The best enter that layer and all deeper ones.

This is half of the paper, the half that saves time. The other half evicts slots, as SnapKV does:
`ComposedCache([FastKV(0.25), SnapKV(0.1)])` is the whole.

Where the sources differ:

* The paper's code passes on a share of the tokens and the window besides; here the budget counts
  the window, as all budgets do.
* The paper's code knows prompts in one forward. In chunks, each chunk keeps its share, and by what
  its own newest queries give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kvprune.errors import KVPruneError
from kvprune.policy import (
    Budget,
    Ranking,
    TokenPolicy,
    TokenView,
    check_context,
    check_kernel,
    check_window,
    pooled,
)
from kvprune.statistics import Queries


@dataclass(frozen=True, repr=False)
class FastKV(TokenPolicy):
    """Prunes hidden states once, by what the newest tokens look at.

    Args:
        keep: what enters the deeper layers, the window included; tokens (int) or a share of the
            row's tokens in this forward (float).
        layer: the first decoder layer that reads fewer tokens, counted from 0; None for the middle
            of the model, as in the paper (16 of 32: what the 16th layer's queries look at).
        window: how many of the newest queries look, and of the newest tokens stay.
        kernel: how many neighbouring tokens a score is pooled over, an odd number.
        pooling: "max" or "average".

    Raises:
        KVPruneError: a number of tokens that has no room beside the window, a window below 1, a
            layer below 1, an even kernel, or another pooling. On first use with a model also: a
            layer that the model does not have, or that stands behind a layer without attention, or
            a window longer than the model's context.
    """

    keep: int | float = 0.25
    layer: int | None = None
    window: int = 8
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        Budget(self.keep, "FastKV: keep")
        check_kernel(self.kernel, self.pooling, "FastKV")
        check_window(self.window, self.keep, "FastKV")
        if self.layer is not None and (type(self.layer) is not int or self.layer < 1):
            raise KVPruneError(
                f"FastKV: layer={self.layer!r}: expected a decoder layer behind the first one, at "
                f"least 1, or None for the middle of the model"
            )

    @property
    def statistics(self) -> tuple[Queries, ...]:
        """The newest queries."""
        return (Queries(self.window),)

    def for_model(self, model: Any) -> FastKV:
        """The policy with its layer; refuses one that the model does not have."""
        check_context(self.window, model, "FastKV")
        config = model.config.get_text_config(decoder=True)
        layers = getattr(config, "decoder_layers", config.num_hidden_layers)
        # Before others nothing was observed: linear layers have no queries.
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
        known = [
            i
            for i in range(1, layers)
            if kinds[i - 1].endswith(("full_attention", "sliding_attention", "chunked_attention"))
        ]
        layer = self.layer
        if layer is None:
            layer = min(known, key=lambda i: abs(i - layers // 2), default=layers)
        if layer not in known:
            raise KVPruneError(
                f"FastKV: layer={layer}: expected a layer behind one with attention, of {layers}: "
                f"{', '.join(map(str, known)) or 'there is none'}"
            )
        return replace(self, layer=layer)

    def applies(self, layer: int) -> bool:
        """At its one layer, if `layers` does not leave it out."""
        return layer == self.layer and super().applies(layer)

    def rank_hidden(self, tokens: TokenView) -> Ranking:
        """Ranks tokens by what the window's queries give them; the window is protected."""
        window = tokens.newest(self.window)
        given = tokens.looks(self.window).sum(3)
        others = tokens.valid[:, None] & ~window
        score = pooled(given, tokens.order, others, self.kernel, self.pooling).sum((1, 2))
        return Ranking(score[:, None], window, tokens.tokens(self.keep))
