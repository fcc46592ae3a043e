"""Fixtures of the tests of bad input."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvprune import ComposedCache

from .checks import filled, h2o


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["empty", "filled"])
def cache(request) -> ComposedCache:
    """A cache of one row that evicts: new, or in use."""
    return ComposedCache([h2o()]) if request.param == "empty" else filled(h2o())
