"""GlobalBudget against a plain-Python oracle, and beside other policies."""

from __future__ import annotations

from typing import Any

import pytest

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.evaluation.specs import canonical, parse
from kvprune.policies import (
    H2O,
    SDTP,
    AdaKV,
    GlobalBudget,
    Knorm,
    KVzap,
    KVzip,
    Saliency,
    SnapKV,
    StreamingLLM,
)
from kvprune.testing import check

from ..support.family_models import attached_family, local_of
from ..support.models import LAYERS, left_padded, prompt, tiny_model
from ..support.oracles_reading import kvzip_kept
from ..support.strategies import sdtp_heads
from .test_by_head import Short
from .test_kvzap import gates
from .test_kvzip import ask, kept_by_row


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize(
    "base", [Short(5), Short(7, sinks=2), Short(6, steps=0.5, sinks=1), Short(3, sinks=5)], ids=repr
)
def test_what_stays_is_the_oracle_s(base, family):
    """Exact sets, in rows with padding; layers with a window keep what they held."""
    model: Any = tiny_model() if family == "llama" else attached_family(family)
    local = [None] * LAYERS if family == "llama" else local_of(family)
    ids, padding = prompt(2, 23), [0, 6]
    dense, cache = ComposedCache(), ComposedCache([GlobalBudget(base)])
    for one in (dense, cache):
        kvprune.read(model, one, **left_padded(ids, padding))
    whole = [layer for layer in range(LAYERS) if local[layer] is None]
    for row, pad in enumerate(padding):
        scores = []
        for layer in whole:
            slots = dense.state.slots(layer)
            norms = -slots.keys[row].norm(dim=-1)
            norms = (norms / base.steps).round() if base.steps else norms
            columns = slots.columns[row].expand(slots.heads, -1).tolist()
            scores.append(
                [
                    {c - pad: float(n) for c, n in zip(held, mine, strict=True) if c >= 0}
                    for held, mine in zip(columns, norms, strict=True)
                ]
            )
        # The oracle's total is what the policy within gives, at least what it protects.
        expected = kvzip_kept(scores, max(base.budget, base.sinks), base.sinks)
        mine, before = kept_by_row(cache, row, pad), kept_by_row(dense, row, pad)
        assert [mine[layer] for layer in whole] == expected
        others = [layer for layer in range(LAYERS) if layer not in whole]
        assert [mine[layer] for layer in others] == [before[layer] for layer in others]


def test_the_invariants_hold():
    """All of `kvprune.testing`'s, alone, with what is observed, and in pipelines."""
    check(GlobalBudget(Knorm(6)), roomy=GlobalBudget(Knorm(500)), examples=1)
    often = GlobalBudget(H2O(3, 3, when="prompt"))
    check(often, roomy=GlobalBudget(H2O(250, 250, when="prompt")), examples=1, seed=1)
    check([SnapKV(9, window=2), GlobalBudget(Knorm(0.4)), H2O(3, 3)], examples=1, seed=2)


BESIDE: dict[str, list[Any]] = {
    "SDTP before": [SDTP(sdtp_heads(), 0.6, 2, 3, 6), GlobalBudget(SnapKV(0.5, window=2))],
    "H2O behind": [GlobalBudget(Knorm(9)), H2O(3, 3)],
    "by head before": [AdaKV(SnapKV(9, window=3)), GlobalBudget(Knorm(6))],
    "some layers": [GlobalBudget(Knorm(6, layers=(1, 2)))],
    "one set": [GlobalBudget(StreamingLLM(2, 7, when="prompt"))],
    "a union": [GlobalBudget(Knorm(6) | SnapKV(6, window=3))],
    "by head within": [GlobalBudget(AdaKV(SnapKV(9, window=3)))],
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_beside_others(family, name):
    """Whatever prunes or evicts before it, behind it or within."""
    if family != "llama" and "SDTP" in name:
        pytest.skip("heads for one model")
    ask(family, BESIDE[name])


def test_heads_that_hold_less_give_nothing_away():
    """A head counts with what it holds, where that is less than its budget."""
    model, ids = tiny_model(), prompt(1, 40)
    before, behind = [AdaKV(Short(9), floor=0.0)], GlobalBudget(Short(9))
    held = []
    for policies in (before, [*before, behind]):
        cache = ComposedCache(policies)
        kvprune.read(model, cache, ids)
        held.append([len(h) for each in kept_by_row(cache, 0, 0) for h in each])
    assert min(held[0]) < 9 < max(held[0])
    assert sum(held[1]) == sum(min(9, count) for count in held[0]) < sum(held[0])


def test_gates_share_one_budget():
    """As KVzip does: the sum over all heads is what each would have by itself, elsewhere."""
    model, ids, zap = tiny_model(), prompt(1, 40), KVzap(gates(), 10, sinks=1, recent=2)
    caches = [ComposedCache([p]) for p in (zap, GlobalBudget(zap))]
    for cache in caches:
        kvprune.read(model, cache, ids)
    counts = [[len(h) for each in kept_by_row(c, 0, 0) for h in each] for c in caches]
    assert set(counts[0]) == {10} and sum(counts[1]) == sum(counts[0])
    assert len(set(counts[1])) > 2


def test_specs_budgets_and_what_is_refused():
    """It is written as it is read, and refuses what has one budget by itself."""
    policy = GlobalBudget(SnapKV(0.25))
    assert repr(parse(canonical([policy]))) == f"[{policy!r}]"
    assert policy.with_budget(0.5) == GlobalBudget(SnapKV(0.5))
    assert GlobalBudget(SnapKV(99)).fixed_budget == 99
    assert policy.hooks == {"rank_layers"}
    for base in (KVzip(0.5), Saliency(0.5), GlobalBudget(Knorm(0.5))):
        with pytest.raises(KVPruneError, match="shares one budget by itself"):
            GlobalBudget(base)
    with pytest.raises(KVPruneError, match="expected a policy that ranks slots"):
        GlobalBudget(SDTP())
