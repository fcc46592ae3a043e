"""Attention implementations of transformers, and what they are called once a model is attached."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ..errors import KVPruneError

FLASH = "flash_attention_2"
BACKENDS = ("sdpa", "eager", FLASH)
PREFIX = "kvprune_"


def backend_of(config: Any) -> str:
    """The attention implementation that a config names, without our prefix."""
    return str(config._attn_implementation or "eager").removeprefix(PREFIX)


def flash_attn_func() -> Callable[..., Any]:
    """flash-attn's function (2.6 or newer, which know a softcap).

    Raises:
        KVPruneError: flash-attn is not installed.
    """
    try:
        function: Callable[..., Any] = importlib.import_module("flash_attn").flash_attn_func
    except (ImportError, AttributeError) as error:
        raise KVPruneError(
            f"attn_implementation={FLASH!r}: expected the package flash-attn, got none that can "
            f"be imported ({error}). Install it (pip install 'kvprune[flash]'), or load the "
            f"model with attn_implementation='sdpa'"
        ) from error
    return function
