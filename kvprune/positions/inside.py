"""Positions inside the cache: which of the two ways policies ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..policy.base import TokenPolicy
from ..policy.composition import leaves
from .base import Positions
from .by_slot import SlotPositions
from .rotary import limit_of, rotations_of
from .sinks import SinkPositions


def positions_for(
    policies: Sequence[TokenPolicy], base: Any, memory: dict[str, Any], rewritable: bool
) -> Positions | None:
    """The positions that some policy wants assigned inside the cache; None if none does.

    Args:
        policies: a pipeline.
        base: the model.
        memory: of the model, where its rotations are kept.
        rewritable: whether keys may be turned where they are held, and not only copies of them.

    Raises:
        KVPruneError: the model has no RoPE.
    """
    parts = list(leaves(policies))
    if not any(p.positions_in_cache for p in parts):
        return None
    if "rotations" not in memory:
        memory["rotations"] = rotations_of(base)
    how = memory["rotations"], limit_of(base)
    answers = {p.sinks_before_window for p in parts if p.evicts}
    sinks = answers.pop() if len(answers) == 1 else None
    if sinks is None or not rewritable:
        return SlotPositions(*how, as_first=not rewritable)
    return SinkPositions(sinks, *how)
