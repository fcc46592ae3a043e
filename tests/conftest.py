"""Settings for all tests."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from .support.models import tiny_model

torch.set_num_threads(1)

_LOOSE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("dev", max_examples=10, deadline=None, suppress_health_check=_LOOSE)
settings.register_profile(
    "ci", max_examples=40, deadline=None, suppress_health_check=_LOOSE, derandomize=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--policy NAME`: of the policies listed in strategies.py only that one, for all tests."""
    parser.addoption("--policy", help="of the policies in strategies.py only this one")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module draws from the list."""
    name = config.getoption("--policy")
    if name is not None:
        os.environ["KVPRUNE_TEST_POLICY"] = name


@pytest.fixture
def model():
    """A tiny attached Llama in float64."""
    return tiny_model()
