"""What can be observed per slot, and how it accumulates.

A statistic is a float per slot and key/value head, `[B, Hkv, S]`. It lives in the slot
layer, moves and vanishes with its slot, starts at zero and is detached from autograd.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .errors import KVPruneError
from .policy import TokenPolicy

OBSERVABLE = {
    "attention": "sum of the softmax probabilities received so far, over the slots then "
    "present; summed over the query heads of a key/value head; padding does not vote",
}


def check_statistics(policy: TokenPolicy) -> None:
    """Refuses a policy that wants something that nobody observes.

    Raises:
        KVPruneError: `policy.statistics` is not a tuple of names in `OBSERVABLE`.
    """
    check_names(policy.statistics, f"{policy!r}: statistics")


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


def wanted_at(policies: Iterable[TokenPolicy], layer: int) -> tuple[str, ...]:
    """Which statistics some policy wants of this layer.

    Eviction reads its own layer's; pruning reads those of the layer before.
    """
    names: dict[str, None] = {}
    for policy in policies:
        evicts = "rank_slots" in policy.hooks and policy.applies(layer)
        prunes = "rank_hidden" in policy.hooks and policy.applies(layer + 1)
        if evicts or prunes:
            names.update(dict.fromkeys(policy.statistics))
    return tuple(names)


def statistic_dtype(keys: Tensor) -> torch.dtype:
    """float32 whatever the model's precision, float64 for a float64 model."""
    return torch.float64 if keys.dtype == torch.float64 else torch.float32
