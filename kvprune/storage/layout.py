"""Layout: whether a layer is one rectangle, or which of its lanes stand in which of several.

A rectangle is as long as its fullest lane, so lanes that keep fewer slots waste the rest. More
rectangles waste less and cost more operators; here are as few as keep the waste small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..attention.lanes import Lanes

Counts = Sequence[Sequence[int]]
"""The slots that each row keeps, by head; one number where all heads keep the same."""

Groups = list[list[int]]
"""Lanes by rectangle."""


waste = 1.0
"""Of the empty slots that are `allowed`, how many are; see `parting_at_once`."""


@contextmanager
def parting_at_once() -> Iterator[None]:
    """Lanes part as soon as they keep different numbers of slots, for tests of few tokens."""
    global waste
    before, waste = waste, 0.0
    try:
        yield
    finally:
        waste = before


def allowed(most: int) -> float:
    """The empty slots that a rectangle may have for each lane, a mean, if its fullest has `most`.

    The room for more slots comes on top (`buffers.spare`): 5 % together, or 8 slots and 2.
    """
    return waste * max(2.0, most / 64)


def rearranged(counts: Counts, lanes: Lanes | None) -> tuple[bool, Groups] | None:
    """Another layout for a layer, where its present one wastes too much or has too many rectangles.

    Args:
        counts: the slots that the layer keeps; see above.
        lanes: of the present layout; None for one rectangle.

    Returns:
        whether lanes are heads (see `Lanes`), and lanes by rectangle; None to keep the layout.
    """
    by_head = any(min(row) < max(row) for row in counts)
    each = [n for row in counts for n in row] if by_head else [row[0] for row in counts]
    if all(_fits(numbers) for numbers in cells(counts, lanes)):
        # Not so soon that the lanes part again in the next step.
        fewer = grouped(each, share=0.5)
        rectangles = 1 if lanes is None else len(lanes.numbers)
        return (by_head, fewer) if len(fewer) < rectangles else None
    return by_head, grouped(each)


def grouped(counts: Sequence[int], share: float = 1.0) -> Groups:
    """Lanes by rectangle.

    Args:
        counts: the slots that each lane keeps.
        share: of what is `allowed`, how much may be empty.
    """
    groups: Groups = []
    empty = most = 0
    for lane in sorted(range(len(counts)), key=lambda i: -counts[i]):
        here = empty + most - counts[lane]
        if groups and here <= share * allowed(most) * (len(groups[-1]) + 1):
            groups[-1].append(lane)
            empty = here
        else:
            groups.append([lane])
            empty, most = 0, counts[lane]
    # In the order of lanes, so that they need not be moved about where they are neighbours.
    return sorted(sorted(group) for group in groups)


def _fits(numbers: Sequence[int]) -> bool:
    """Whether a rectangle whose rows and heads keep so many slots is full enough."""
    most = max(numbers)
    return sum(most - n for n in numbers) <= allowed(most) * len(numbers)


def cells(counts: Counts, lanes: Lanes | None) -> list[list[int]]:
    """The slots that each row and head keeps, by rectangle."""
    if lanes is None:
        return [[n for row in counts for n in row]]
    if not lanes.by_head:
        return [[n for row in group for n in counts[row]] for group in lanes.numbers]
    heads, last = lanes.heads, len(counts[0]) - 1
    return [[counts[n // heads][min(n % heads, last)] for n in group] for group in lanes.numbers]
