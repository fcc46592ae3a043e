"""The Pareto front: the choices that are cheaper or better than all others."""

from __future__ import annotations

import math
from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point is on the Pareto front.

    A point is on the front if no other point is at least as cheap and as good, and differs from it.
    Equal points are on it together or not at all. A point whose cost or quality is not finite is on
    no front.

    Args:
        points: cost (less is better) and quality (more is better).
    """
    real = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]
    order = sorted(real, key=lambda i: (points[i][0], -points[i][1]))
    found, best, last = [False] * len(points), float("-inf"), None
    for i in order:
        if points[i][1] > best or points[i] == last:
            found[i], best, last = True, points[i][1], points[i]
    return found
