"""Work that runs in threads of its own, each with a share of torch's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Found = TypeVar("Found")


def in_threads(work: Callable[[int], Found], count: int, at_once: bool = True) -> list[Found]:
    """`work(0)` to `work(count - 1)`, at once where that may be.

    Many small operations one after the other, each by all of torch's threads, wait for the slowest
    thread at each one's end: on two cores with something else to do, twenty times as long as they
    take. Here they wait once. Who watches what this thread does (a dispatch mode, a profiler, a
    compiler) sees all of it, one after the other; what comes out is the same.

    Args:
        work: without autograd; may run in any thread.
        count: at least 1.
        at_once: whether it may.
    """
    threads = torch.get_num_threads()
    if torch.compiler.is_compiling() or not at_once or min(count, threads) == 1 or _watched():
        return [work(number) for number in range(count)]
    inference = torch.is_inference_mode_enabled()

    def run(number: int) -> Found:
        # Modes and numbers of threads are each thread's own.
        torch.set_num_threads(max(threads // count, 1))
        with torch.inference_mode(inference), torch.no_grad():
            return work(number)

    with ThreadPoolExecutor(count) as pool:
        try:
            return list(pool.map(run, range(count)))
        finally:
            # Also what threads that begin later start out with.
            torch.set_num_threads(threads)


def _watched() -> bool:
    """Whether something looks at this thread's operations that sees no other's."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return modes > 0 or torch.autograd._profiler_enabled()
