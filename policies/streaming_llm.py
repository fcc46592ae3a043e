"""StreamingLLM: attention sinks and a window (arXiv 2309.17453).

Keeps each row's first `sinks` tokens and the last `window` of the other slots present.

Deviation: keys keep their original positions, as kvpress and others do. The paper assigns
positions inside the cache, so that a stream may run past the trained context; that is not
offered yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvprune.errors import KVPruneError
from kvprune.policy import Budget, Ranking, SlotView, TokenPolicy


@dataclass(frozen=True, repr=False)
class StreamingLLM(TokenPolicy):
    """Keeps attention sinks and a sliding window.

    Args:
        sinks: how many of a row's first tokens stay for good (int, 0 for none).
        window: how many of the newest other slots stay, at least 1; tokens (int) or a share
            of the prompt (float).
        layers: the layers it works on; None for all.

    Raises:
        KVPruneError: a number out of range.
    """

    sinks: int = 4
    window: int | float = 1020

    def __post_init__(self) -> None:
        Budget(self.window, "StreamingLLM: window")
        if not isinstance(self.sinks, int) or isinstance(self.sinks, bool) or self.sinks < 0:
            raise KVPruneError(
                f"StreamingLLM: sinks={self.sinks!r}: expected a number of tokens (an int of at "
                f"least 0)"
            )

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Columns rank; the sinks are protected and do not use up the window."""
        sinks = slots.valid & (slots.columns < slots.first[:, None, None] + self.sinks)
        window = Budget(self.window).of(slots.prompt_length)
        # float64: columns stay exact up to 2 ** 53.
        return Ranking(slots.columns.double(), sinks, sinks.sum(-1) + window[:, None])
