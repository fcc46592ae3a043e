"""A picture that fits into a line of a table: tokens that enter each layer, slots that it keeps."""

from __future__ import annotations

from collections.abc import Sequence

from .summary import CellCost

WIDTH, HEIGHT = 72, 20


def areas(cost: CellCost) -> tuple[str, str]:
    """SVG paths of `WIDTH` by `HEIGHT`: tokens that enter each layer, and slots that it keeps."""
    if not cost.tokens or not cost.pruned:
        return "", ""
    entered = [1 - pruned / cost.tokens for pruned in cost.pruned]
    # A layer that has a state keeps no slots.
    both = zip(entered, cost.evicted, strict=True)
    kept = [0.0 if gone is None else e - gone / cost.tokens for e, gone in both]
    return _area(entered), _area(kept)


def _area(shares: Sequence[float]) -> str:
    """A path like a stair, with a step for each layer, down to the ground."""
    step, parts = WIDTH / len(shares), [f"M0 {HEIGHT}"]
    for layer, share in enumerate(shares):
        parts.append(f"V{HEIGHT * (1 - share):.1f}H{step * (layer + 1):.1f}")
    return "".join([*parts, f"V{HEIGHT}Z"])
