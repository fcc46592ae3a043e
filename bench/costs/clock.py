"""Measures seconds and peaks of memory, on the device that the model is on."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .. import resident

Tick = Callable[[float], None]
"""A function that is told what share of a part is done, 0 to 1."""

Anything = TypeVar("Anything")


@dataclass(frozen=True)
class Clock:
    """The clock of a device; it waits for work that was only queued."""

    device: str = "cpu"

    @property
    def is_cuda(self) -> bool:
        """Whether torch counts the device's memory itself."""
        return self.device.startswith("cuda")

    def now(self) -> float:
        """The time in seconds, once all work that was begun is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any]) -> float:
        """The seconds of one call; the result of the call is kept until the clock is read."""
        start = self.now()
        kept = work()
        passed = self.now() - start
        del kept
        return passed

    def begin_peak(self) -> int | None:
        """Frees unused memory and counts the peak anew.

        Returns:
            the bytes held now; None where nobody knows.
        """
        resident.give_back()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        return resident.forget_peak()

    def peak_beyond(self, before: int | None) -> int | None:
        """The most bytes since `begin_peak`, beyond the bytes that were held then.

        On a CPU the whole process counts, on a GPU torch's allocator.

        Args:
            before: what `begin_peak` returned.

        Returns:
            bytes; None where nobody knows.
        """
        most = torch.cuda.max_memory_allocated(self.device) if self.is_cuda else resident.peak()
        return None if before is None or most is None else most - before


def turns(items: Sequence[Anything], number: int) -> list[Anything]:
    """All items, beginning with another one in each turn: no item always follows the same one."""
    at = number % len(items)
    return [*items[at:], *items[:at]]


def tidy() -> None:
    """Collects the garbage of earlier runs, so that this is not done while a run is timed."""
    gc.collect()
