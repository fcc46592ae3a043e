"""Whether kernels for a CPU can be used: numba is an extra, `pip install kvprune[cpu]`."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from ..models.devices import in_memory

MANY = 1 << 14
"""Vectors over which a kernel's one thread is busy for about a millisecond."""


def cpu_kernels_for(vectors: Tensor) -> ModuleType | None:
    """The module `cpu_kernels`, if it can take vectors `[..., n]` and is faster; else None.

    A kernel runs on one thread. Torch's operators run on all, and overtake it where there are more
    than two of them and many vectors.
    """
    # First of all: a compiler must not come to what is asked then.
    if not in_memory(vectors):
        return None
    many = vectors.numel() > MANY * vectors.shape[-1] and torch.get_num_threads() > 2
    return None if many else _imported()


@functools.cache
def _imported() -> ModuleType | None:
    try:
        from . import cpu_kernels
    except (ImportError, OSError):
        return None
    return cpu_kernels
