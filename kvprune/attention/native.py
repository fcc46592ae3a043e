"""Whether kernels for a CPU can be used: numba is an extra, `pip install kvprune[cpu]`."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

MANY = 1 << 14
"""Vectors over which a kernel's one thread is busy for about a millisecond."""


def cpu_kernels_for(vectors: Tensor) -> ModuleType | None:
    """The module `cpu_kernels`, if it can take vectors `[..., n]` and is faster; else None.

    It takes plain tensors that are in memory here: none of a compiler, and none without numbers.
    A kernel runs on one thread. Torch's operators run on all, and overtake it where there are more
    than two of them and many vectors.
    """
    if torch.compiler.is_compiling() or vectors.device.type != "cpu" or type(vectors) is not Tensor:
        return None
    if vectors.numel() > MANY * vectors.shape[-1] and torch.get_num_threads() > 2:
        return None
    return _imported()


@functools.cache
def _imported() -> ModuleType | None:
    try:
        from . import cpu_kernels
    except (ImportError, OSError):
        return None
    return cpu_kernels
