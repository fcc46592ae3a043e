"""What a cache would hold that had read what another has: other policies, or a stock cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..engine.arrival import Arrival
from ..engine.layer_step import at_layer
from ..engine.step import Step
from ..engine.turnover import evict_across
from ..errors import KVPruneError
from ..models.families import head_sizes
from ..models.structure import attention_of, decoder_layers
from ..policy.base import TokenPolicy
from ..policy.composition import evicts
from ..policy.moment import Moment
from .binding import Binding
from .state import CacheState
from .wired import WiredCache


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
def evict_all(binding: Binding, state: CacheState, base: Any) -> None:
    """Asks the policies at every layer, as at the end of a forward of all that was seen.

    Args:
        binding, state: of the cache.
        base: the model that has the decoder layers.
    """
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
    layers = decoder_layers(base)
    for index, layer in state.slot_layers():
        at_layer(step, index, layer).evict(attention=attention_of(layers[index]))
    evict_across(step)
    step.let_go()


def take_dynamic(cache: WiredCache, given: Any, mask: Tensor | None, base: Any) -> None:
    """Stores what a stock cache holds in an empty one, and asks the policies.

    Args:
        cache: empty, bound to the model.
        given: what is to be a `DynamicCache` with something in it.
        mask: `[B, seen]`, 0 for padding; None for none.
        base: the model that has the decoder layers.

    Raises:
        KVPruneError: see `ComposedCache.from_dynamic`; nothing was stored then.
    """
    layers = _checked_layers(cache.state, given, base)
    _check_knows(cache)
    seen = given.get_seq_length()
    shape, device = layers[0].keys.shape, layers[0].keys.device
    cache.open_step(shape[0], seen, mask, device)
    done = False
    try:
        for index, (layer, model) in enumerate(zip(layers, decoder_layers(base), strict=True)):
            keys, values = layer.keys, layer.values
            # A layer with a window may hold its newest tokens alone.
            whole = cache.at_layer(index).on(keys.device)
            columns = whole.columns[:, -keys.shape[2] :]
            part = replace(whole, columns=columns, slot_columns=columns[:, None])
            part.store(keys, values)
            part.evict(attention=attention_of(model))
        done = True
    finally:
        cache.close_step(done)


def _checked_layers(state: CacheState, given: Any, base: Any) -> list[Any]:
    """The layers of a stock cache that fits; refuses any other."""
    if not isinstance(given, DynamicCache) or not given.get_seq_length():
        what = "an empty one" if isinstance(given, DynamicCache) else f"{type(given).__name__}"
        raise KVPruneError(
            f"from_dynamic: expected a DynamicCache that has read something, got {what}"
        )
    layers: list[Any] = list(given.layers)
    kinds = {type(layer).__name__ for layer in layers}
    if state.is_hybrid or {type(x) for x in layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
        raise KVPruneError(
            f"from_dynamic: expected layers that hold keys and values alone, got "
            f"{', '.join(sorted(kinds))}"
        )
    if len(layers) != len(state.layers):
        raise KVPruneError(
            f"from_dynamic: expected what this model has read, with {len(state.layers)} layers, "
            f"got {len(layers)} layers"
        )
    seen, rows = given.get_seq_length(), layers[0].keys.shape[0]
    for (index, slots), layer in zip(state.slot_layers(), layers, strict=True):
        held = 0 if layer.keys is None else layer.keys.shape[2]
        # A layer with a window may have let go what is out of sight.
        least = seen if slots.local is None else min(seen, slots.local.size - 1)
        if not least <= held <= seen or layer.keys.shape[0] != rows:
            raise KVPruneError(
                f"from_dynamic: layer {index} holds {held} tokens of {seen}: expected at least "
                f"{least}, in {rows} rows. A cache that a forward left unfinished, or that "
                f"something else made shorter, does not say which tokens these are"
            )
    sizes = head_sizes(base)
    found = {layer.keys.shape[-1] for layer in layers}
    if sizes and not found <= set(sizes):
        raise KVPruneError(
            f"from_dynamic: expected what this model has read, with {list(sizes)} numbers a head, "
            f"got {sorted(found)}"
        )
    return layers


def _check_knows(cache: WiredCache) -> None:
    """Refuses policies that go by what a stock cache does not know."""
    for policy in cache.policies:
        if "rank_hidden" in policy.hooks or policy.statistics:
            why = [repr(statistic) for statistic in policy.statistics] or ["hidden states"]
            raise KVPruneError(
                f"from_dynamic: {policy!r} goes by {', '.join(why)}, of which a DynamicCache knows "
                f"nothing: expected policies that go by keys, values and columns alone, as Knorm. "
                f"Read the prompt with ComposedCache([...]) instead"
            )
    if cache.state.positions is not None:
        raise KVPruneError(
            "from_dynamic: expected policies that leave positions as they are, got some inside "
            "the cache, by which keys are held differently"
        )
