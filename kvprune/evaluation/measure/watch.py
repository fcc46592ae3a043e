"""The cost of reading prompts with a cache, measured while a model reads them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...cache.composed import ComposedCache
from ...models.devices import devices_of
from ...models.structure import base_of, decoder_layers, unwrapped
from ..ledger.results import Cost
from .flops import Flops


class Watch:
    """Measures the cost of reading prompts: `with Watch(model, cache, columns) as watch`.

    Args:
        model: an attached model.
        cache: an empty cache, with which the prompts are read, by `generate` or otherwise.
        columns: the columns of the prompts, padding included; forwards beyond them are not counted.
    """

    def __init__(self, model: Any, cache: ComposedCache, columns: int) -> None:
        self._base: Any = base_of(unwrapped(model))
        self._devices = devices_of(self._base)
        self._cache, self._columns = cache, columns
        self._handles: list[Any] = []
        self._counting = False
        self._begun = self._seconds = 0.0
        self._tokens = torch.zeros(0)
        self._entered: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}
        self._held = self._peak = 0

    def __enter__(self) -> Watch:
        layers = enumerate(decoder_layers(self._base))
        self._handles = [
            self._base.register_forward_pre_hook(self._before),
            self._base.register_forward_hook(self._after),
            *(x.register_forward_hook(partial(self._after_layer, i)) for i, x in layers),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def costs(self, flops: Flops, prompts: int) -> list[Cost]:
        """The cost of each prompt of the batch.

        Seconds, bytes held and bytes at peak are each prompt's equal share of the batch's. FLOPs
        are those of one forward with all tokens that entered a layer, even if there were several
        forwards.

        Args:
            flops: the costs of the model's parts.
            prompts: the number of prompts; in beam search the number of rows is a multiple of it.
        """
        each = len(self._tokens) // prompts
        entered = torch.stack(list(self._entered.values()), 1)[::each].tolist()
        kept = {layer: slots[::each].tolist() for layer, slots in self._kept.items()}
        tokens = self._tokens[::each].tolist()
        return [
            Cost(
                prefill_seconds=self._seconds / prompts,
                prefill_flops=flops.of_prompt(count, row),
                decode_tokens_per_second=None,
                bytes_held=self._held // prompts,
                bytes_peak=self._peak // prompts,
                prompt_tokens=count,
                entered=tuple(row),
                # A layer with a state holds no slots.
                kept=tuple(kept[i][prompt] if i in kept else None for i in self._entered),
            )
            for prompt, (count, row) in enumerate(zip(tokens, entered, strict=True))
        ]

    def _before(self, *_: Any) -> None:
        self._counting = self._cache.seen < self._columns
        self._begun = now(self._devices)

    def _after_layer(self, index: int, *_: Any) -> None:
        if not self._counting:
            return
        step = self._cache.step
        # The counts of all layers go to one device, wherever the layers are.
        entered = (step.columns >= 0).sum(-1).to(step.rows.first.device)
        self._entered[index] = self._entered.get(index, 0) + entered
        self._tokens = torch.full_like(entered, step.seen + step.count)
        if step.padding is not None:
            self._tokens -= step.padding.sum(-1)
        self._peak = max(self._peak, self._cache.nbytes)

    def _after(self, *_: Any) -> None:
        if not self._counting:
            return
        self._seconds += now(self._devices) - self._begun
        self._held = self._cache.nbytes
        self._peak = max(self._peak, self._held)
        self._kept = {index: self._kept_in(index) for index, _ in self._cache.slot_layers()}

    def _kept_in(self, layer: int) -> Tensor:
        """The slots that a layer holds in each row `[B]`, a mean over the heads."""
        held = (self._cache.columns(layer) >= 0).sum(-1).double().mean(-1)
        return held.to(self._tokens.device).expand(len(self._tokens))


def now(devices: Iterable[torch.device]) -> float:
    """The time in seconds, after the devices have finished their work."""
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    return time.perf_counter()
