"""StreamingLLM: attention sinks and a window (arXiv 2309.17453).

Each layer keeps a row's first `sinks` tokens and the newest `window` of the other slots present.

`positions="cache"` assigns positions inside the cache, as the paper does, so that a stream may
run on past the trained context. `positions="original"`, the way of kvpress and others, keeps each
token's position in the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvprune.errors import KVPruneError
from kvprune.policy import Budget, Ranking, SlotView, TokenPolicy, check_positions, split_share


@dataclass(frozen=True, repr=False)
class StreamingLLM(TokenPolicy):
    """Keeps attention sinks and a sliding window.

    Args:
        sinks: how many of a row's first tokens stay for good (int, 0 for none).
        window: how many of the newest other slots stay, at least 1; tokens (int) or a share
            of the prompt (float).
        positions: "original", or "cache" (for models with RoPE; a `position_ids` that the user
            hands in is then ignored).
        layers: the layers that the policy works on; None for all.

    Raises:
        KVPruneError: a number out of range; other positions.
    """

    sinks: int = 4
    window: int | float = 1020
    positions: str = "original"

    constant_budget = True
    layers_alike = True

    def __post_init__(self) -> None:
        Budget(self.window, "StreamingLLM: window")
        if not isinstance(self.sinks, int) or isinstance(self.sinks, bool) or self.sinks < 0:
            raise KVPruneError(
                f"StreamingLLM: sinks={self.sinks!r}: expected a number of tokens (an int of at "
                f"least 0)"
            )
        check_positions(self.positions, "StreamingLLM")

    @property
    def positions_in_cache(self) -> bool:  # type: ignore[override]
        """Whether positions are assigned inside the cache."""
        return self.positions == "cache"

    @property
    def sinks_before_window(self) -> int:  # type: ignore[override]
        """The number of sinks: the slots that this policy leaves have one gap, behind the sinks."""
        return self.sinks

    def with_budget(self, share: float) -> StreamingLLM:
        """A copy whose window gets the share; the sinks, always a few tokens, come on top."""
        (window,) = split_share(share, self.window)
        return replace(self, window=window)

    @property
    def fixed_budget(self) -> int:
        """The sum of sinks and window where the window is given in tokens; else 0."""
        return self.sinks + self.window if isinstance(self.window, int) else 0

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Ranks slots by column; the sinks are protected and do not use up the window."""
        sinks = slots.oldest(self.sinks)
        budget = sinks.sum(-1) + slots.tokens(self.window)[:, None]
        # float64: columns stay exact up to 2 ** 53.
        return Ranking(slots.columns.double(), sinks, budget)
