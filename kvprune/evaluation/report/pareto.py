"""Which of several choices are worth a look: cheaper or better than all others."""

from __future__ import annotations

import math
from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are on the Pareto front: none is at least as cheap and as good, and differs.

    Args:
        points: cost (less is better) and quality (more is better); one that is not a number in
            either is on no front. Equal points are on it together or not at all.
    """
    real = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]
    order = sorted(real, key=lambda i: (points[i][0], -points[i][1]))
    found, best, last = [False] * len(points), float("-inf"), None
    for i in order:
        if points[i][1] > best or points[i] == last:
            found[i], best, last = True, points[i][1], points[i]
    return found
