"""Every family in the table of docs/families.md, against the oracle: one cell, one test.

Each cell reads a padded prompt and decodes on a tiny random model in float64, and must give
the logits and hold the columns that the dense model gives and keeps when what is gone is
masked out of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import kvprune

from ..support.family_cells import (
    CELLS,
    ROOMY,
    Subject,
    check_against_the_oracle,
    check_roomy,
    close,
)
from ..support.family_models import (
    CANNOT_PRUNE,
    FAMILIES,
    SLOW,
    StaysDouble,
    attached_family,
    eager_family,
    family_model,
    linear_of,
    local_of,
    plain_family,
    slots_of,
    tiles_heads,
)
from ..support.models import LAYERS, prompt

every_family = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f in SLOW)) for f in FAMILIES]
)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), StaysDouble():
        yield


def subject_of(family: str) -> Subject:
    """The family's models, and what its caches hold, all written down by hand."""
    return Subject(
        plain_family(family),
        attached_family(family),
        eager_family(family),
        [slots_of(family)] * LAYERS,
        local_of(family),
        linear_of(family),
        tiles_heads(family),
    )


def refused(family: str, policies: list[kvprune.TokenPolicy]) -> bool:
    """Whether the family cannot be pruned; the error must say so, and why."""
    if family not in CANNOT_PRUNE or not any("rank_hidden" in p.hooks for p in policies):
        return False
    with pytest.raises(kvprune.KVPruneError, match=f"^SDTP.*{CANNOT_PRUNE[family]}"):
        attached_family(family)(prompt(1, 9), past_key_values=kvprune.ComposedCache(policies))
    return True


@pytest.mark.parametrize("roomy", ROOMY)
@every_family
def test_roomy_equals_the_dense_model(family, roomy):
    """In `generate`: the tokens and the logits of DynamicCache, with a padded row."""
    if refused(family, ROOMY[roomy]()):
        return
    check_roomy(subject_of(family), ROOMY[roomy]())


@every_family
def test_without_our_cache_nothing_changes(family):
    """Bit-equal logits while attached, also with DynamicCache; no hook left after `detach`."""
    model, plain, ids = family_model(family), plain_family(family), prompt(2, 9)
    before = model.config._attn_implementation
    kvprune.attach(model)
    options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    got, expected = (m.generate(ids, **options).logits for m in (model, plain))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    kvprune.detach(model)
    assert model.config._attn_implementation == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("roomy", ["no policy", "H2O"])
@pytest.mark.parametrize("family", ["llama", "bloom", "falcon", "falcon-alibi", "deepseek_v3"])
def test_roomy_equals_the_dense_model_with_the_eager_backend(family, roomy):
    """Also where that computes something else than sdpa does, as Falcon's with ALiBi."""
    ids = prompt(2, 14)
    expected = eager_family(family)(ids).logits
    cache = kvprune.ComposedCache(ROOMY[roomy]())
    model = kvprune.attach(family_model(family, "eager"))
    got = [model(ids[:, :9], past_key_values=cache).logits]
    got += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(9, 14)]
    close(torch.cat(got, 1), expected)


@pytest.mark.parametrize("cell", CELLS)
@every_family
def test_family_against_the_oracle(family, cell):
    """`generate`, then a second turn of several tokens: logits and columns of every step."""
    if not refused(family, CELLS[cell][0]()):
        check_against_the_oracle(subject_of(family), cell)
