"""Seconds and peaks, on whatever device the model is."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .. import resident

Tick = Callable[[float], None]
"""Told what share of a part is done, 0 to 1."""

Anything = TypeVar("Anything")


@dataclass(frozen=True)
class Clock:
    """A device's: work that was only queued is waited for."""

    device: str = "cpu"

    @property
    def is_cuda(self) -> bool:
        """Whether torch counts the device's memory itself."""
        return self.device.startswith("cuda")

    def now(self) -> float:
        """Seconds, once all that was begun is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one call; what it gives is kept until the clock is read."""
        start = self.now()
        kept = work()
        passed = self.now() - start
        del kept
        return passed

    def begin_peak(self) -> int | None:
        """Frees what is unused and counts anew; the bytes held now, None where nobody knows."""
        resident.give_back()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        return resident.forget_peak()

    def peak_beyond(self, before: int | None) -> int | None:
        """The most bytes since `begin_peak` beyond what was held then.

        Of the whole process on a CPU, of torch's allocator on a GPU.
        """
        most = torch.cuda.max_memory_allocated(self.device) if self.is_cuda else resident.peak()
        return None if before is None or most is None else most - before


def turns(items: Sequence[Anything], number: int) -> list[Anything]:
    """All of them, beginning with another one in each turn: nobody always follows the same."""
    at = number % len(items)
    return [*items[at:], *items[:at]]


def tidy() -> None:
    """Collects what earlier runs left, so that it is not done while one is timed."""
    gc.collect()
