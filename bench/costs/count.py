"""Counts bytes and FLOPs of one prefill, in a run of its own that is not timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kvprune.evaluation.measure.flops import Flops, counting, layers_of, own_flops

from ..live import LiveBytes
from .candidates import Make, held
from .clock import Clock


def counted(model: Any, ids: Tensor, make: Make, flops: Flops, clock: Clock) -> dict[str, Any]:
    """The bytes and FLOPs of reading `ids` `[B, n]` with a fresh cache.

    Returns:
        a dict with these keys:

        * `live`: the most bytes of tensors at once, beyond those that were there before.
        * `peak`: the bytes that the process (or the GPU's allocator) held at most beyond those
          that it held before; None where nobody knows.
        * `held`: the bytes of the cache afterwards.
        * `flops`: FLOPs by `kvprune.evaluation.measure.flops`.
        * `counted_flops`: FLOPs by torch's counter, which sees that H2O's blocks leave out what a
          query cannot see.
    """
    cache, before = make(), clock.begin_peak()
    with LiveBytes() as live, counting() as counter, entering(model) as entered:
        with own_flops() as own:
            model(ids, past_key_values=cache, logits_to_keep=1)
        beyond = clock.peak_beyond(before)
    rows, tokens = ids.shape
    return {
        "live": live.peak,
        "peak": beyond,
        "held": held(cache),
        # The last forward's: a cache may have tried before how the model turns its keys.
        "flops": rows * flops.of_prompt(tokens, entered[-len(layers_of(model)) :]) + sum(own),
        "counted_flops": counter.get_total_flops(),
    }


@contextmanager
def entering(model: Any) -> Iterator[list[int]]:
    """Counts the tokens of a row that enter each layer, in forwards inside the context."""
    entered: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: entered.append(given[0].shape[1]))
        for layer in layers_of(model)
    ]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()
