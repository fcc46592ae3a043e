"""Small tensors that are made once for each dtype and device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MADE: dict[Any, Tensor] = {}


def constant(make: Callable[..., Tensor], *args: Any) -> Tensor:
    """What `make(*args)` gives, made at the first call; never written to.

    Not by `functools.lru_cache`, which `torch.compile` does not see.
    """
    key = (make.__name__, *args)
    if key not in _MADE:
        # A tensor that is made in inference mode could not be used where gradients are on.
        with torch.inference_mode(False):
            _MADE[key] = make(*args)
    return _MADE[key]
