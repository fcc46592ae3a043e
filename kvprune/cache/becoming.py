"""One reading of a prompt, many policies: what a cache with other policies would hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..engine.arrival import Arrival
from ..engine.layer_step import at_layer
from ..engine.step import Step
from ..engine.turnover import evict_across
from ..errors import KVPruneError
from ..policy.base import TokenPolicy
from ..policy.composition import evicts
from ..policy.moment import Moment
from .binding import Binding
from .state import CacheState


def check_becomes(
    policies: Sequence[TokenPolicy],
    binding: Binding | None,
    state: CacheState,
    others: Sequence[TokenPolicy],
    bound: Binding,
    empty: CacheState,
) -> None:
    """Refuses policies that would have read something else, or that cannot know it.

    Args:
        policies: of the cache that has read something.
        binding: its model; None where it has none yet.
        state: what it holds.
        others: the other policies.
        bound: these on their model.
        empty: what a new cache with these holds.

    Raises:
        KVPruneError: see `ComposedCache.with_policies`.
    """
    if not state.is_initialized or binding is None or binding.attachment is not bound.attachment:
        raise KVPruneError(
            f"with_policies: expected a cache that has read something with this model, got "
            f"one that {'belongs to another' if state.is_initialized else 'is empty'}"
        )
    mine, wanted = ([p for p in each if "rank_hidden" in p.hooks] for each in (policies, others))
    if mine != wanted or evicts(policies):
        raise KVPruneError(
            f"with_policies: read with {list(policies)!r}, and got "
            f"{list(others)!r}: expected a cache without policies that evict, and the "
            f"same ones that prune hidden states"
        )
    if state.fixed:
        raise KVPruneError(
            f"with_policies: expected a cache that lacks nothing of what was read, got one "
            f"loaded from a file of which {state.fixed} columns were subject to eviction"
        )
    if state.positions is not None or empty.positions is not None:
        raise KVPruneError(
            "with_policies: expected policies that leave positions as they are: positions "
            "inside the cache are part of what was read"
        )
    for (index, layer), (_, new) in zip(state.slot_layers(), empty.slot_layers(), strict=True):
        if new.layer_parts:
            raise KVPruneError(
                f"with_policies: {list(others)!r} needs {list(new.layer_parts)} at layer {index}, "
                f"which is gone once a prompt was read: expected policies with statistics per slot "
                f"alone. Read the prompt again with these policies"
            )
        if not set(new.parts) <= set(layer.parts):
            raise KVPruneError(
                f"with_policies: {list(others)!r} needs {list(new.parts)} at layer "
                f"{index}, which was not observed: read with ComposedCache(observe="
                f"{new.parts!r})"
            )


@torch.no_grad()
def evict_all(binding: Binding, state: CacheState) -> None:
    """Asks the policies at every layer, as at the end of a forward of all that was seen."""
    assert state.rows is not None
    columns = torch.arange(state.seen, device=state.rows.first.device)
    columns = columns.expand(state.batch_size, -1)
    if state.padding is not None:
        hidden = torch.nn.functional.pad(
            state.padding, (0, state.seen - state.padding.shape[1]), value=False
        )
        columns = columns.masked_fill(hidden, -1)
    new = Arrival(columns, state.padding is None, state.padding, state.rows, False)
    asked = torch.zeros_like(columns, dtype=torch.bool)
    group = binding.attachment.group
    # Where a policy goes by a second reading, that was observed.
    moment = Moment(state.seen, ends=True, first=True, read_again=True)
    step = Step(binding.policies, len(state.layers), 0, new, asked, moment, group=group)
    for index, layer in state.slot_layers():
        at_layer(step, index, layer).evict()
    evict_across(step)
    step.let_go()
