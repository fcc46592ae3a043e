"""Quantised stores in `generate`, on every family: as a cache that holds what is read back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kvprune
from kvprune import ComposedCache, Quantized
from kvprune.models.families import head_sizes
from kvprune.models.structure import base_of
from kvprune.policies import H2O, KeyDiff, SnapKV
from kvprune.testing.stand_ins import ReadBack

from ..support.family_models import FAMILIES, SLOW, StaysDouble, attached_family
from ..support.models import left_padded, prompt
from ..support.strategies import sdtp_pruner
from .test_composition import QUICK, TAKES_NO_DRAFTS

every_family = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f in SLOW)) for f in FAMILIES]
)
# By default some families try all of it, and the others that heavy hitters are right.
some_families = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f not in QUICK)) for f in FAMILIES]
)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), StaysDouble():
        yield


def stores_of(family: str, bits: Any) -> tuple[Quantized, Quantized]:
    """A store whose group divides the family's head sizes, and its reference."""
    sizes = head_sizes(base_of(attached_family(family)))
    group = max(n for n in (4, 8, 16) if not any(size % n for size in sizes))
    store = Quantized(bits, group)
    return store, ReadBack.like(store)


def generated(family: str, policies: list[Any], store: Quantized, **how: Any) -> Any:
    """Tokens and logits of a padded batch, and the columns that are kept."""
    inputs = left_padded(prompt(2, 16), [0, 5])
    cache = ComposedCache(policies, store=store)
    options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    model: Any = attached_family(family)
    found = model.generate(**inputs, cache=cache, **options, **how)
    return found, [cache.columns(index) for index, _ in cache.slot_layers()]


def check(family: str, policies: list[Any], bits: Any, **how: Any) -> None:
    """The same as the reference, in tokens, logits and kept columns."""
    store, reference = stores_of(family, bits)
    got, held = generated(family, policies, store, **how)
    expected, other = generated(family, policies, reference, **how)
    assert torch.equal(got.sequences, expected.sequences)
    for mine, read_back in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, read_back, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(held, other, strict=True))


@some_families
def test_with_nothing_evicted(family: str):
    fits = not any(size % 8 for size in head_sizes(base_of(attached_family(family))))
    check(family, [], bits=(5, 4) if fits else 4)


@every_family
def test_heavy_hitters_of_what_is_read_back(family: str):
    check(family, [H2O(3, 3)], bits=8)


@some_families
def test_beams(family: str):
    check(family, [H2O(4, 4)], bits=4, num_beams=3)


@some_families
def test_drafts(family: str):
    model: Any = attached_family(family)
    if family in TAKES_NO_DRAFTS or model._is_stateful:
        return
    how: dict[str, Any] = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 6}
    ids = prompt(1, 4).repeat(1, 4)
    caches = [ComposedCache([H2O(3, 3)], store=store) for store in stores_of(family, 4)]
    assert torch.equal(*(model.generate(ids, cache=cache, **how) for cache in caches))


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt_neox", "gemma3_text"])
def test_policies_that_read_queries_and_keys(family: str):
    policies: list[kvprune.TokenPolicy] = [
        sdtp_pruner(0.6),
        SnapKV(0.7, window=2, kernel=3),
        KeyDiff(6, when=None, layers=[1, 2, 3]),
    ]
    check(family, policies, bits=8)
