"""What it costs to read prompts with a cache, noted while a model reads them."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from kvprune.cache import ComposedCache
from kvprune.families import base_of, decoder_layers, unwrapped

from .flops import Flops
from .results import Cost


class Watch:
    """Notes what the first forward inside the context costs: `with Watch(model, cache) as watch`.

    Args:
        model: attached.
        cache: an empty one, with which the forward is done, by `generate` or otherwise.
    """

    def __init__(self, model: Any, cache: ComposedCache) -> None:
        self._base: Any = base_of(unwrapped(model))
        self._cache = cache
        self._handles: list[Any] = []
        self._begun = self._seconds = 0.0
        self._tokens = torch.zeros(0)
        self._entered: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._held = self._peak = 0

    def __enter__(self) -> Watch:
        self._handles = [
            self._base.register_forward_pre_hook(self._before),
            self._base.register_forward_hook(self._after),
            *(x.register_forward_hook(self._after_layer) for x in decoder_layers(self._base)),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def costs(self, flops: Flops, prompts: int) -> list[Cost]:
        """What each prompt of the batch cost.

        Seconds, bytes held and bytes at peak are each prompt's equal share of the batch's.

        Args:
            flops: of the model.
            prompts: how many there were; rows are a multiple of that in beam search.
        """
        each = self._entered[0].shape[0] // prompts
        entered = torch.stack(self._entered, 1)[::each].tolist()
        kept = torch.stack(self._kept, 1)[::each].tolist()
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
                kept=tuple(slots),
            )
            for count, row, slots in zip(tokens, entered, kept, strict=True)
        ]

    def _before(self, *_: Any) -> None:
        if self._cache.seen == 0:
            self._begun = self._now()

    def _after_layer(self, *_: Any) -> None:
        if self._cache.seen:
            return
        step = self._cache.step
        if not self._entered:
            valid = step.count if step.padding is None else (~step.padding).sum(-1)
            self._tokens = torch.as_tensor(valid).expand(step.columns.shape[0])
        self._entered.append((step.columns >= 0).sum(-1))
        self._peak = max(self._peak, self._cache.nbytes)

    def _after(self, *_: Any) -> None:
        if self._kept:
            return
        self._seconds = self._now() - self._begun
        self._held = self._cache.nbytes
        self._peak = max(self._peak, self._held)
        rows = self._entered[0].shape[0]
        for index, _ in self._cache.slot_layers():
            held = (self._cache.columns(index) >= 0).sum(-1).double().mean(-1)
            self._kept.append(held.expand(rows))

    def _now(self) -> float:
        if self._base.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()
