"""The share of a prompt's slots that fits into a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..cache.binding import attached
from ..cache.composed import ComposedCache
from ..errors import KVPruneError
from ..models.devices import device_of
from ..models.structure import base_of, unwrapped
from ..policy.base import TokenPolicy
from ..policy.checks import checked
from ..policy.composition import leaves
from ..statistics import parts_of
from ..storage.buffers import SLACK
from ..storage.layer import SlotLayer
from ..storage.quantized import Quantized
from .read import read

WASTE = 1 / 64
"""Of a layer's slots, what rectangles of lanes of different lengths may waste; see `layout`."""
LENGTHS = (64, 128)
"""The tokens that are read to learn what a slot takes."""


@torch.no_grad()
def share_for_bytes(
    model: Any,
    nbytes: int,
    tokens: int,
    policies: Sequence[TokenPolicy],
    *,
    store: Quantized | None = None,
    rows: int = 1,
    new: int = 0,
) -> float:
    """The largest share of a prompt that may stay, so that a cache takes no more than `nbytes`.

        share = kvprune.share_for_bytes(model, 64 * 2**20, 8192, [SnapKV()], store=Quantized())
        cache = ComposedCache([SnapKV(share)], store=Quantized())

    What a slot takes is measured: 64 and 128 tokens are read. It is counted as if each head kept
    slots of its own, so that the result is a little less where all keep the same.

    Args:
        model: attached.
        nbytes: of the whole cache; `64 * 2**20` is 64 MiB.
        tokens: of the prompt.
        policies: the pipeline; their own budgets do not matter. What prunes hidden states alone
            makes caches smaller than counted.
        store: see `ComposedCache`.
        rows: of the batch.
        new: tokens that are generated and stay; 0 for policies that evict while they decode.

    Returns:
        above 0.0 and up to 1.0, a whole number of slots over `tokens`.

    Raises:
        KVPruneError: a model that is not attached, a number below 1 (`new`: below 0), no policy
            that evicts, or so few bytes that not one slot of each head fits.
    """
    attached(model, "share_for_bytes")
    numbers = {"nbytes": nbytes, "tokens": tokens, "rows": rows, "new": new + 1}
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            least = 0 if name == "new" else 1
            got = number - 1 if name == "new" and type(number) is int else number
            raise KVPruneError(
                f"share_for_bytes: {name}: expected an int of at least {least}, got {got!r}. Bytes "
                f"are a whole number, as 64 * 2**20 for 64 MiB"
            )
    evicting = [policy for policy in leaves(checked(policies)) if policy.evicts]
    if not evicting:
        raise KVPruneError(
            f"share_for_bytes: {list(policies)!r}: expected a policy that evicts, whose budget is "
            f"a share of the prompt"
        )
    fixed, each = _taken(model, evicting, store, tokens + new)
    # Buffers that grow have room for a few slots more, and so have heads of different lengths.
    beside = new + new // 32 + SLACK
    slots = int(((nbytes / rows - fixed) / each - beside) / (1 + WASTE))
    if slots < 1:
        fewest = int((fixed + (1 + WASTE + beside) * each) * rows) + 1
        raise KVPruneError(
            f"share_for_bytes: {nbytes} bytes for {rows} rows of {tokens} tokens: expected at "
            f"least {fewest}. Take a store of fewer bits, or shorter prompts"
        )
    return min(1.0, slots / tokens)


def _taken(
    model: Any, evicting: Sequence[TokenPolicy], store: Quantized | None, columns: int
) -> tuple[float, float]:
    """The bytes of a row in layers that keep all, and those of a slot in all other layers.

    Args:
        model: attached.
        evicting: the policies that evict.
        store: see `ComposedCache`.
        columns: of the prompt, and of what follows it.
    """
    base: Any = base_of(unwrapped(model))
    working = [policy.for_model(base) for policy in evicting]
    observe = parts_of([s for policy in working for s in policy.statistics if s.per == "slot"])
    caches = []
    for length in LENGTHS:
        caches.append(ComposedCache(observe=observe, store=store))
        ids = torch.arange(length, device=device_of(base.get_input_embeddings()))[None]
        read(model, caches[-1], ids % base.config.get_text_config(decoder=True).vocab_size)
    fixed, each, shared = 0.0, 0.0, 0
    for index, (short, long) in enumerate(zip(*(c.layers for c in caches), strict=True)):
        if not isinstance(long, SlotLayer):
            fixed += sum(t.nbytes for t in _states(long))
            continue
        slot = (_bytes(long) - _bytes(short)) / (LENGTHS[1] - LENGTHS[0])
        if long.local is not None:
            # Until its window is full, a layer grows as others do.
            slot = _bytes(short) / short.used if short.used else 0.0
            fixed += slot * min(columns, long.local.size)
        elif any(policy.layers is None or index in policy.layers for policy in evicting):
            each += slot + (long.heads - 1) * long.columns.itemsize
        else:
            # Layers that hold the same share their columns, which are counted once, below.
            fixed += (slot - long.columns.itemsize) * columns
            shared = long.columns.itemsize * columns
    return fixed + shared, each


def _bytes(layer: SlotLayer) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in layer.tensors()}
    return sum(storage.nbytes() for storage in storages.values())


def _states(layer: Any) -> list[torch.Tensor]:
    found = (*layer.conv_states.values(), *layer.recurrent_states.values())
    return [state for state in found if state is not None]
