"""Work that runs in threads of its own, each with a share of torch's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Found = TypeVar("Found")


def in_threads(work: Callable[[int], Found], count: int, at_once: bool = True) -> list[Found]:
    """`work(0)` to `work(count - 1)`, at once where that may be.

    Many small operations one after the other, each by all of torch's threads, wait for the slowest
    thread at each one's end: on two cores with something else to do, twenty times as long as they
    take. Here they wait once. Who watches what this thread does (a dispatch mode, a profiler, a
    compiler) sees all of it, one after the other, with the same results up to rounding.

    Args:
        work: without autograd; may run in any thread.
        count: at least 1.
        at_once: whether it may.
    """
    threads = torch.get_num_threads()
    if torch.compiler.is_compiling() or not at_once or min(count, threads) == 1 or _watched():
        return [work(number) for number in range(count)]
    inference, ready = torch.is_inference_mode_enabled(), Barrier(count + 1)

    def run(number: int) -> Found:
        # Modes and numbers of threads are each thread's own; asked first, or torch would set the
        # number once more when the thread first computes.
        torch.get_num_threads()
        torch.set_num_threads(max(threads // count, 1))
        ready.wait()
        with torch.inference_mode(inference), torch.no_grad():
            return work(number)

    with ThreadPoolExecutor(count) as pool:
        try:
            found = [pool.submit(run, number) for number in range(count)]
            ready.wait()
        except BaseException:
            # Not all could begin, or somebody pressed Ctrl-C: those that wait would for ever.
            ready.abort()
            pool.shutdown()
            torch.set_num_threads(threads)
            raise
        # A thread's number is also what others start out with: it is put right before they can.
        torch.set_num_threads(threads)
        return [each.result() for each in found]


def _watched() -> bool:
    """Whether something meddles with this thread's operations and with no other's."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return modes > 0 or torch.autograd._profiler_enabled() or torch.is_autocast_enabled("cpu")
