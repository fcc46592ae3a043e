"""What goes after the last layer.

A layer by itself frees slots at once; see `LayerStep.evict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..storage.group import LayerGroup
from .step import Step
from .survivors import next_to_go, surviving_layers


def evict_together(step: Step, before: Sequence[LayerGroup]) -> list[LayerGroup]:
    """In decoding at a full budget, layers that are alike each free a slot, all at once.

    Args:
        step: the forward.
        before: what this gave in the step before.
    """
    groups = []
    for due in step.due.values():
        # Such layers are one rectangle each.
        layers = [at.slots.rectangles[0] for at in due]
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


def evict_across(step: Step) -> None:
    """Where a policy sees all layers at once, it and those behind it are asked now."""
    if not step.put_off:
        return
    late, several = step.late_at(step.moment), step.count > 1
    layers = [at.slots for at, _ in step.put_off]
    # Some statistics are known only now, as `Survival`.
    views = [
        replace(view, statistic=view.statistic.renewed(at.slots.statistics | at.slots.records))
        for at, view in step.put_off
    ]
    left = surviving_layers(late, views, several, step.not_finite)
    for slots, view in zip(layers, left, strict=True):
        if bool((view.valid == (slots.columns >= 0)).all()):
            slots.keep_all()
        else:
            slots.keep(view.valid)
