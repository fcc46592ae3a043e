"""Decoding at a full budget, for layers that are alike: after the last one, each frees a slot.

A layer by itself does so at once; see `LayerStep.evict`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..storage.group import LayerGroup
from .step import Step
from .survivors import next_to_go


def evict_together(step: Step, before: Sequence[LayerGroup]) -> list[LayerGroup]:
    """After the last layer, the slots go that layers which are alike give up at once.

    Args:
        step: the forward.
        before: what this gave in the step before.
    """
    groups = []
    for due in step.due.values():
        layers = [at.slots for at in due]
        number = layers[0].turnover.policy
        assert number is not None
        same = (group for group in before if group.lent_to(layers))
        group = next(same, None) or LayerGroup(layers)
        rows = due[0].rows.below(len(layers))
        view = due[0].view(group.columns, group.statistics, rows)
        gone = next_to_go(step.evicters[number], view)
        if gone is not None:
            group.free(gone, number)
        groups.append(group)
    return groups
