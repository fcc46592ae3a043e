"""Windows of newest queries, whose own slots always stay."""

from __future__ import annotations

from typing import Any

from ..errors import KVPruneError


def check_window(window: Any, budget: int | float, policy: str) -> None:
    """Refuses a window that is none, or that leaves no room in a budget of tokens.

    Args:
        window: how many of the newest queries look.
        budget: what is kept in all, the window included.
        policy: whose they are, for the error.

    Raises:
        KVPruneError: see above.
    """
    if type(window) is not int or window < 1:
        raise KVPruneError(f"{policy}: window={window!r}: expected a number of tokens, at least 1")
    if isinstance(budget, int) and budget <= window:
        raise KVPruneError(
            f"{policy}: {budget!r} tokens: expected more tokens than the window ({window}), which "
            f"always stays, or a share as 0.25"
        )


def check_context(window: int, model: Any, policy: str) -> None:
    """Refuses a window that no prompt of a model fills.

    Raises:
        KVPruneError: see above.
    """
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and window > longest:
        raise KVPruneError(
            f"{policy}: window={window}: expected at most the model's context of {longest} tokens"
        )
