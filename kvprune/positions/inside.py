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
    policies: Sequence[TokenPolicy], base: Any, memory: dict[str, Any]
) -> Positions | None:
    """The positions that some policy wants assigned inside the cache; None if none does.

    Args:
        policies: a pipeline.
        base: the model.
        memory: of the model, where its rotations are kept.

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
    return SlotPositions(*how) if sinks is None else SinkPositions(sinks, *how)
