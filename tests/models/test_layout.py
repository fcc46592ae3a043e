"""Layers of several rectangles in `generate`, on every family: as layers of one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvprune import ComposedCache
from kvprune.storage import layout

from ..support.family_models import StaysDouble, attached_family
from ..support.models import left_padded, prompt
from ..support.uneven import Threshold
from .test_composition import TAKES_NO_DRAFTS
from .test_stores import every_family, some_families


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), StaysDouble():
        yield


def generated(
    family: str, inputs: dict[str, Any], waste: float, least: float = 0.7, **how: Any
) -> Any:
    """Tokens and logits, and the cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layout, "waste", waste)
        cache = ComposedCache([Threshold(least, 2)])
        options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
        model: Any = attached_family(family)
        return model.generate(**inputs, cache=cache, **options, **how), cache


def check(family: str, inputs: dict[str, Any], **how: Any) -> None:
    """The same in tokens, logits and kept columns."""
    got, cache = generated(family, inputs, 0.0, **how)
    expected, whole = generated(family, inputs, math.inf, **how)
    layers = [layer for _, layer in cache.state.slot_layers()]
    assert any(layer.lanes is not None for layer in layers)
    assert all(layer.lanes is None for _, layer in whole.state.slot_layers())
    assert torch.equal(got.sequences, expected.sequences)
    for mine, other in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    for index, _ in cache.state.slot_layers():
        assert torch.equal(cache.columns(index), whole.columns(index))


@every_family
def test_padded_rows(family: str):
    check(family, left_padded(prompt(2, 16), [0, 9]))


@some_families
def test_beams(family: str):
    check(family, left_padded(prompt(2, 16), [0, 9]), num_beams=3)


@some_families
def test_drafts(family: str):
    if family in TAKES_NO_DRAFTS:
        pytest.skip("takes no drafts with policies that observe attention")
    if attached_family(family)._is_stateful:
        pytest.skip("transformers refuses drafts where layers keep states")
    check(family, {"input_ids": prompt(1, 20)}, least=0.4, prompt_lookup_num_tokens=3)
