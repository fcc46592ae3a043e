"""The moment at which policies are asked: where a forward is between prompt and decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import KVPruneError


@dataclass(frozen=True)
class Moment:
    """Facts about a forward, or a piece of one, that are the same for all rows and layers.

    new: its columns, those of tokens that were pruned included.
    left: columns of the announced prompt that are still to come.
    since: columns since the prompt's end; 0 where it ends with these, or is still to end.
    ends: whether a prompt ends with these columns.
    first: whether no prompt ended before these columns.
    read_again: whether the prompt that ends was read a second time.
    """

    new: int
    left: int = 0
    since: int = 0
    ends: bool = False
    first: bool = False
    read_again: bool = False

    def is_due(self, when: int | str | None) -> bool:
        """Whether a policy with this `when` is asked about slots now; see `TokenPolicy`."""
        if when is None:
            return True
        if isinstance(when, str):
            return self.ends and (when == "prompt" or self.first)
        # A forward of several tokens may step over a multiple.
        return self.ends or self.since // when > max(self.since - self.new, 0) // when

    def comes(self, when: int | str | None) -> bool:
        """Whether such a policy is asked now, or later with what is observed from now on.

        That is not beyond the end of this prompt for policies that are asked at ends of prompts.
        """
        if not isinstance(when, str):
            return True
        return (self.ends or self.left > 0) and (when == "prompt" or self.first)


def check_when(when: Any, policy: str) -> None:
    """Refuses what says no time.

    Args:
        when: what was given.
        policy: whose it is, for the error.

    Raises:
        KVPruneError: not None, "prompt", "first", or a whole number of at least 1.
    """
    if when is None or when in ("prompt", "first") or (type(when) is int and when >= 1):
        return
    raise KVPruneError(
        f"{policy}: when={when!r}: expected None (in every forward), 'prompt' (at the end of each "
        f"prompt), 'first' (at the end of the first prompt) or every how many new tokens, at least "
        f"1"
    )
