"""Compositions of the field's methods in `generate`, on every family: rows, beams and drafts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kvprune
from kvprune.policies import (
    H2O,
    TOVA,
    ExpectedAttention,
    FastKV,
    KeyDiff,
    Knorm,
    ObservedAttention,
    PyramidKV,
    Random,
    SnapKV,
    StreamingLLM,
)

from ..support.family_cells import check_row, stock_rows_stand_alone
from ..support.family_models import CANNOT_PRUNE, FAMILIES, SLOW, StaysDouble, attached_family
from ..support.models import left_padded, prompt
from ..support.strategies import sdtp_pruner
from .test_families import subject_of

UPPER = [1, 2, 3]
"""In the first layer equal tokens have keys that score alike but for rounding, so that which of
them stays is chance."""

PIPELINES: dict[str, list[kvprune.TokenPolicy]] = {
    "SnapKV, then H2O": [SnapKV(0.5, window=2, kernel=3), H2O(3, 3)],
    "FastKV, then TOVA": [FastKV(0.6, window=2, kernel=3), TOVA(6)],
    "SDTP, then Knorm or KeyDiff": [
        sdtp_pruner(0.6),
        Knorm(0.4, layers=UPPER) | KeyDiff(0.4, layers=UPPER),
    ],
    "ExpectedAttention, then TOVA": [ExpectedAttention(0.5, sinks=2, future=9), TOVA(6)],
    "H2O or StreamingLLM": [H2O(2, 2) | StreamingLLM(1, 4)],
    "split by layers": [
        PyramidKV(0.5, window=1, kernel=3, layers=[0, 1]),
        ObservedAttention(5, layers=[2, 3]),
    ],
}
SHOWS_NO_QUERIES = ("bloom", "falcon", "falcon-alibi", "falcon-new")
TAKES_NO_DRAFTS = (*SHOWS_NO_QUERIES, "deepseek_v3")

# By default all families try one pipeline, and some families all of them.
QUICK = ("llama", "mistral-window", "gemma3_text", "gpt_neox", "falcon", "deepseek_v3")

every_cell = pytest.mark.parametrize(
    ("family", "pipeline"),
    [
        pytest.param(family, pipeline, marks=[pytest.mark.slow] * slow)
        for family in FAMILIES
        for number, pipeline in enumerate(PIPELINES)
        for slow in [family in SLOW or (number > 0 and family not in QUICK)]
    ],
)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), StaysDouble():
        yield


def refused(family: str, pipeline: str) -> bool:
    """Whether the family cannot do it; the error must say so, and why."""
    policies, why = PIPELINES[pipeline], ""
    if family in CANNOT_PRUNE and any("rank_hidden" in p.hooks for p in policies):
        why = CANNOT_PRUNE[family]
    elif family in SHOWS_NO_QUERIES and any("Queries" in repr(p.statistics) for p in policies):
        why = r"Queries\(\w+=\d\) cannot be observed on"
    elif family in SHOWS_NO_QUERIES and "Moments" in repr([p.statistics for p in policies]):
        why = r"QueryMoments\(skip=\d\) cannot be observed on"
    elif family == "deepseek_v3" and "Moments" in repr([p.statistics for p in policies]):
        why = "latent keys"
    if not why:
        return False
    with pytest.raises(kvprune.KVPruneError, match=why):
        attached_family(family)(prompt(1, 9), past_key_values=kvprune.ComposedCache(policies))
    return True


@every_cell
def test_a_row_is_as_it_is_alone(family, pipeline):
    """Logits and columns, in a padded batch."""
    subject = subject_of(family)
    if not refused(family, pipeline) and stock_rows_stand_alone(subject):
        check_row(subject, PIPELINES[pipeline])


@every_cell
def test_beams(family, pipeline):
    """A row in a batch has the beams that it has alone."""
    if refused(family, pipeline):
        return
    model: Any = attached_family(family)
    ids, said = prompt(2, 14), []
    for rows in (2, 1):
        cache = kvprune.ComposedCache(PIPELINES[pipeline])
        inputs = left_padded(ids[:rows], [0, 0][:rows])
        options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
        said.append(model.generate(**inputs, cache=cache, **options)[:1])
    assert torch.equal(*said)


@every_cell
def test_drafts(family, pipeline):
    """Drafts lead to the tokens that there are without them."""
    if refused(family, pipeline):
        return
    model: Any = attached_family(family)
    ids, said = torch.cat([prompt(1, 7)] * 2, 1), []
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    cache = kvprune.ComposedCache(PIPELINES[pipeline])
    if family in TAKES_NO_DRAFTS or model._is_stateful:
        match = "are refused: |assisted generation is not supported with stateful models"
        with pytest.raises(ValueError, match=match):
            model.generate(ids, cache=cache, prompt_lookup_num_tokens=3, **options)
        return
    for drafts in ({}, {"prompt_lookup_num_tokens": 3}):
        cache = kvprune.ComposedCache(PIPELINES[pipeline])
        said.append(model.generate(ids, cache=cache, **drafts, **options))
    assert torch.equal(*said)


PRUNERS: dict[str, kvprune.TokenPolicy] = {
    "SDTP": sdtp_pruner(0.6),
    "FastKV": FastKV(0.6, window=2, kernel=3),
}
EVICTERS: dict[str, kvprune.TokenPolicy] = {
    "H2O": H2O(3, 3),
    "StreamingLLM": StreamingLLM(2, 5),
    "StreamingLLM inside": StreamingLLM(2, 5, positions="cache"),
    "SnapKV": SnapKV(0.5, window=2, kernel=3),
    "PyramidKV": PyramidKV(0.5, window=1, kernel=3, beta=4),
    "TOVA": TOVA(6),
    "ObservedAttention": ObservedAttention(6, when=3),
    "ExpectedAttention": ExpectedAttention(7, sinks=1, future=9, when=2),
    "KeyDiff": KeyDiff(6, when=None, layers=UPPER),
    "Knorm": Knorm(6, layers=UPPER),
    "Random": Random(6, when=None),
}


@pytest.mark.parametrize(
    ("family", "pruner", "evicter"),
    [
        pytest.param(family, pruner, evicter, marks=[pytest.mark.slow] * (family != "llama"))
        for family in ("llama", "mistral-window", "gemma3_text", "gpt_neox")
        for pruner in PRUNERS
        for evicter in EVICTERS
    ],
)
def test_every_pair_of_pruner_and_evicter(family, pruner, evicter):
    """A row as it is alone, beams as of one row, and drafts of two kinds as without."""
    model: Any = attached_family(family)
    policies = [PRUNERS[pruner], EVICTERS[evicter]]
    check_row(subject_of(family), policies)
    twice = torch.cat([prompt(1, 7)] * 2, 1)

    def said(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        cache = kvprune.ComposedCache(policies)
        return model.generate(ids, cache=cache, max_new_tokens=6, do_sample=False, **options)

    both = torch.cat([twice, prompt(1, 14, 3)])
    assert torch.equal(said(both, num_beams=3)[:1], said(twice, num_beams=3))
    alone = said(twice)
    assert torch.equal(said(twice, prompt_lookup_num_tokens=3), alone)
    assistant = attached_family("mistral" if family != "mistral" else "llama")
    assert torch.equal(said(twice, assistant_model=assistant), alone)
