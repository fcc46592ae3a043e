"""What a statistic makes of what it knew and what it is handed, checked."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import KVPruneError
from ..statistics import Block, Statistic


def joined(part: Statistic, before: Tensor, new: Any, several: bool) -> Tensor:
    """What `Statistic.join` makes of `[B, Hkv, S]`, checked; see `SlotLayer.observe`."""
    value = part.join(before, new)
    _check_joined(part, before, value)
    if several and part.checked:
        _check_comparable(part, value, new)
    return value


def _check_joined(part: Statistic, before: Tensor, value: Any) -> None:
    fits = isinstance(value, Tensor) and value.shape == before.shape
    if not fits or value.dtype != before.dtype or value.device != before.device:
        raise KVPruneError(
            f"{part!r}: expected join() to return {before.dtype} of shape {list(before.shape)} on "
            f"{before.device}, as it was handed, got {described(value)}"
        )


def _check_comparable(part: Statistic, value: Tensor, new: Tensor | Block) -> None:
    """Refuses NaN in what a statistic returned, unless it was handed NaN."""
    given = new if isinstance(new, Tensor) else new.probabilities
    rows = value.isnan().flatten(1).any(-1) & ~given.isnan().flatten(1).any(-1)
    if bool(rows.any()):
        raise KVPruneError(
            f"{part!r}: expected join() to return numbers that can be compared, got NaN in rows "
            f"{rows.nonzero().flatten().tolist()}"
        )


def described(value: Any) -> str:
    """What somebody returned, for an error."""
    if isinstance(value, tuple):
        return f"({', '.join(map(described, value))})"
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)} on {value.device}"
    return type(value).__name__
