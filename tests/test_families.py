"""Every family in the table of docs/families.md, against the oracle: one cell, one test.

Each cell reads a padded prompt and decodes on a tiny random model in float64, and must give
the logits and hold the columns that the dense model gives and keeps when what is gone is
masked out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kvprune
from kvprune.policies import H2O, StreamingLLM

from .family_models import (
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
)
from .family_oracle import FamilyOracle, Keeper, RowByRow, h2o_keeper, streaming_keeper
from .models import LAYERS, left_padded, positions, prompt
from .strategies import sdtp_pruner

CELLS: dict[str, tuple[Callable[[], list[Any]], Keeper | None]] = {
    "SDTP": (lambda: [sdtp_pruner(0.6)], None),
    "H2O": (lambda: [H2O(3, 3)], h2o_keeper(3, 3)),
    "StreamingLLM": (lambda: [StreamingLLM(2, 4)], streaming_keeper(2, 4)),
    "SDTP + H2O": (lambda: [sdtp_pruner(0.6), H2O(3, 3)], h2o_keeper(3, 3)),
}

ROOMY = {
    "no policy": list,
    "H2O": lambda: [H2O(500, 500)],
    "StreamingLLM": lambda: [StreamingLLM(4, 1000)],
    "SDTP": lambda: [sdtp_pruner(1.0)],
}


every_family = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f in SLOW)) for f in FAMILIES]
)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), StaysDouble():
        yield


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within what float64 rounding explains, through four layers of weights this large."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


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
    inputs = left_padded(prompt(2, 14), [0, 5])
    options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    expected = plain_family(family).generate(**inputs, **options)
    cache = kvprune.ComposedCache(ROOMY[roomy]())
    got = attached_family(family).generate(**inputs, cache=cache, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for mine, dense in zip(got.logits, expected.logits, strict=True):
        close(mine, dense)


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


def oracle_for(family: str, cell: str, rows: int = 2) -> FamilyOracle | RowByRow:
    """The dense model with masks; where layers keep a state, one without the pruned tokens."""
    make, keeper = CELLS[cell]
    pruner = make()[0] if "SDTP" in cell else None
    linear = linear_of(family)
    arguments = (eager_family(family), slots_of(family), pruner, keeper, local_of(family), linear)
    if linear and pruner is not None:
        return RowByRow(*arguments, rows=rows)
    return FamilyOracle(*arguments)


@pytest.mark.parametrize("cell", CELLS)
@every_family
def test_family_against_the_oracle(family, cell):
    """`generate`, then a second turn of several tokens: logits and columns of every step."""
    policies = CELLS[cell][0]()
    if refused(family, policies):
        return
    # With states, a second turn is pruned in a single row only.
    for rows in (2, 1) if linear_of(family) else (2,):
        oracle = oracle_for(family, cell, rows)
        model, cache = attached_family(family), kvprune.ComposedCache(policies)
        inputs = left_padded(prompt(rows, 16), [0, 5][:rows])
        check_generate(model, cache, oracle, inputs)
        assert_same_columns(cache, oracle, linear_of(family))
        if isinstance(oracle, FamilyOracle) or rows == 1:
            check_second_turn(model, cache, oracle)
            assert_same_columns(cache, oracle, linear_of(family))


def check_generate(model, cache, oracle, inputs) -> None:
    """Five tokens of `generate`, logits step by step."""
    out = model.generate(
        **inputs, cache=cache, max_new_tokens=5, output_logits=True, return_dict_in_generate=True
    )
    close(out.logits[0], oracle.forward(inputs["input_ids"], inputs["attention_mask"])[:, -1])
    one = torch.ones_like(inputs["input_ids"][:, :1])
    for step in range(1, 5):
        token = out.sequences[:, 15 + step : 16 + step]
        close(out.logits[step], oracle.forward(token, one)[:, -1])


def check_second_turn(model, cache, oracle) -> None:
    """A forward of several tokens, and one of a single token."""
    for count in (8, 1):
        new = prompt(oracle.mask.shape[0], count, seed=count)
        expected = oracle.forward(new, torch.ones_like(new))[:, -1]
        options = {"attention_mask": oracle.mask}
        if oracle.takes_positions:
            options["position_ids"] = positions(oracle.mask)[:, -count:]
        got = model(new, past_key_values=cache, logits_to_keep=1, **options).logits[:, -1]
        close(got, expected)


def assert_same_columns(cache, oracle, linear) -> None:
    """Every layer with slots, row and head."""
    for layer in set(range(LAYERS)) - set(linear):
        columns = cache.columns(layer).expand(-1, oracle.heads, -1)
        for row in range(oracle.mask.shape[0]):
            for head in range(oracle.heads):
                kept = [int(c) for c in columns[row, head] if c >= 0]
                assert kept == oracle.kept(layer, row, head)
