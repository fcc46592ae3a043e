"""Statistics: what can be observed per slot, and how it accumulates.

A statistic is a float per slot and key/value head, `[B, Hkv, S]`. It lives in the slot
layer, moves and vanishes with its slot, starts at zero and is detached from autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import KVPruneError

OBSERVABLE = {
    "attention": "sum of the softmax probabilities received so far, over the slots then "
    "present; summed over the query heads of a key/value head; padding does not vote",
}


def check_names(wanted: Any, what: str) -> None:
    """Refuses names of statistics that nobody observes.

    Raises:
        KVPruneError: not a tuple of names in `OBSERVABLE`.
    """
    names = isinstance(wanted, tuple) and all(isinstance(name, str) for name in wanted)
    if not names or not set(wanted) <= set(OBSERVABLE):
        raise KVPruneError(
            f"{what} = {wanted!r}: expected a tuple of names out of {sorted(OBSERVABLE)}"
        )


def statistic_dtype(keys: Tensor) -> torch.dtype:
    """float32 whatever the model's precision, float64 for a float64 model."""
    return torch.float64 if keys.dtype == torch.float64 else torch.float32
