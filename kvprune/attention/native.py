"""Whether kernels for a CPU can be used: numba is an extra, `pip install kvprune[cpu]`."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor


def cpu_kernels_for(vectors: Tensor) -> ModuleType | None:
    """The module `cpu_kernels`, if it can take such a tensor; else None.

    It takes plain tensors that are in memory here: none of a compiler, and none without numbers.
    """
    if torch.compiler.is_compiling() or vectors.device.type != "cpu" or type(vectors) is not Tensor:
        return None
    return _imported()


@functools.cache
def _imported() -> ModuleType | None:
    try:
        from . import cpu_kernels
    except ImportError:
        return None
    return cpu_kernels
