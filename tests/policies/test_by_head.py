"""AdaKV, ChunkKV and CriticalKV against plain-Python oracles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.evaluation.specs import canonical, parse
from kvprune.policies import (
    DMS,
    H2O,
    RKV,
    TOVA,
    AdaKV,
    ChunkKV,
    CriticalKV,
    ExpectedAttention,
    FastKV,
    Knorm,
    KVzip,
    SnapKV,
    StreamingLLM,
)
from kvprune.policies.adakv import _mixed
from kvprune.storage import layout

from ..support import oracles_by_head as oracles
from ..support.family_models import attached_family
from ..support.models import left_padded, prompt, tiny_model
from ..support.strategies import chunked, head_counts, seeds
from .test_field import drive


@dataclass(frozen=True)
class Short(kvprune.TokenPolicy):
    """Short keys stay, and a row's first and newest slots.

    budget: of each head.
    recent: how many of the newest stay in any case.
    steps: scores are whole numbers of these, so that some are equal; 0 for no such steps.
    sinks: how many of the first stay in any case.
    """

    budget: int
    recent: int = 0
    steps: float = 0.0
    sinks: int = 0

    def rank_slots(self, slots):
        """See `TokenPolicy.rank_slots`."""
        score = -slots.keys.norm(dim=-1)
        if self.steps:
            score = (score / self.steps).round()
        protected = slots.newest(self.recent) if self.recent else torch.zeros_like(slots.valid)
        protected = protected | slots.oldest(self.sinks)
        return kvprune.Ranking(score, protected, torch.full((len(score),), self.budget))

    def of(self, row: Any) -> tuple[list[dict[int, float]], list[set[int]]]:
        """Scores and protected columns of a row, by head, for an oracle."""
        norms = -np.linalg.norm(row.k, axis=-1)
        norms = np.round(norms / self.steps) if self.steps else norms
        score = [{c: float(norms[h, c]) for c in held} for h, held in enumerate(row.held)]
        newest = row.k.shape[1] - self.recent
        return score, [{c for c in held if c >= newest} for held in row.held]


BASES = [Short(5), Short(6, recent=2), Short(6, recent=1, steps=0.5), Short(2, recent=3)]
turns = st.tuples(st.integers(2, 24), st.integers(2, 8))


def check(policy: Any, oracle: Any, heads: Any, sizes: Any, data: Any, seed: int) -> None:
    """Chunks, left padding, decode steps and a second turn: exact sets."""
    pieces = data.draw(chunked(sizes[0]))
    padding = [0, data.draw(st.integers(0, pieces[0] - 1))]
    drive(policy, oracle, heads, [pieces, [sizes[1]]], padding, seed, decode=4)


@pytest.mark.parametrize("base", BASES, ids=repr)
@pytest.mark.parametrize("floor", [0.0, 0.2, 0.35, 1.0])
@given(head_counts, turns, st.data(), seeds)
def test_adakv(base, floor, heads, sizes, data, seed):
    def oracle(row):
        return oracles.ada_keep(row.held, *base.of(row), base.budget, floor)

    check(AdaKV(base, floor=floor), oracle, heads, sizes, data, seed)


@pytest.mark.parametrize("base", BASES, ids=repr)
@pytest.mark.parametrize("size", [1, 3, 20])
@given(head_counts, turns, st.data(), seeds)
def test_chunkkv(base, size, heads, sizes, data, seed):
    def oracle(row):
        number = range(row.k.shape[1])
        return oracles.chunk_keep(row.held, *base.of(row), base.budget, size, number)

    check(ChunkKV(base, size=size), oracle, heads, sizes, data, seed)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.1, 0.2, 1 / 3, 0.5, 0.999, 1.0]),
    st.randoms(use_true_random=False),
)
def test_budgets_add_up(even, floor, draw):
    """Exactly, and no head gets more than it has."""
    total = sum(even)
    count = [0] * len(even)
    for _ in range(total):
        open_ = [i for i in range(len(even)) if count[i] < 3 * even[i] + 3]
        count[draw.choice(open_)] += 1
    got = _mixed(torch.tensor([count]), torch.tensor([even]), floor, torch.tensor([total]))[0]
    assert int(got.sum()) == total
    for mine, best, share in zip(got.tolist(), count, even, strict=True):
        assert min(best, share) <= mine <= max(best, share)


@dataclass(frozen=True)
class FirstHeadBest(kvprune.TokenPolicy):
    """Every slot of the first head is worth more than any of the second."""

    def rank_slots(self, slots):
        """See `TokenPolicy.rank_slots`."""
        columns = slots.columns.expand(-1, slots.heads, -1)
        score = columns.double() + 1000 * torch.tensor([1, 0])[:, None]
        protected = torch.zeros_like(columns, dtype=torch.bool)
        return kvprune.Ranking(score, protected, torch.full((len(score),), 10))


@pytest.mark.parametrize("base", [H2O(heavy=8, recent=2), FirstHeadBest()], ids=repr)
@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_a_layer_keeps_its_budget_however_often_it_is_asked(base, floor):
    """A head that gave slots away cannot take them back, so that the others keep them."""
    cache, model = ComposedCache([AdaKV(base, floor=floor)]), tiny_model()
    with torch.no_grad():
        for count in (40, 1, 1, 1, 5, 1, 9, *[1] * 12):
            model(prompt(2, count, seed=count), cache=cache)
            for index in range(len(cache)):
                held = (cache.columns(index) >= 0).sum((1, 2))
                assert (held == 20).all(), (count, index, held)


def critical(row, weight, budget, protected):
    """CriticalKV of one row: half by score, the rest by score and value."""
    kept = []
    for head, held in enumerate(row["held"]):
        score = dict(zip(held, row["score"][head], strict=True))
        order = sorted(held, key=lambda c: (c in protected, score[c], c), reverse=True)
        first = order[: max(budget // 2, len(protected))]
        lowest = min(0.0, *score.values())
        added = {}
        for column in held:
            value = row["values"][head][held.index(column)]
            each = [np.abs(value @ weight[head, group]).sum() for group in range(weight.shape[1])]
            added[column] = (score[column] - lowest + 1e-4) * sum(each) / len(each)
        rest = sorted(
            (c for c in held if c not in first), key=lambda c: (added[c], c), reverse=True
        )
        kept.append(sorted(first + rest[: budget - len(first)]))
    return kept


@pytest.mark.parametrize("window", [0, 2, 5])
@pytest.mark.parametrize("below", [0, 9])
def test_criticalkv(window, below):
    """Of layer 0 of a model; with protected slots, and with scores that are negative."""
    seen = {}

    @dataclass(frozen=True)
    class Looking(kvprune.TokenPolicy):
        """Scores by a hash; notes what it was shown."""

        layers_alike = False

        def rank_slots(self, slots):
            columns = slots.columns.expand(-1, slots.heads, -1)
            # Scores differ by so little that values decide the second half.
            mixed = (columns * 37 + torch.arange(slots.heads)[:, None] * 11) % 17
            score = 1 + mixed.double() / 100 - below
            if slots.layer == 0:
                seen.update(columns=columns, score=score, values=slots.values)
                seen["weight"] = slots.output_weight
            protected = slots.newest(window) if window else torch.zeros_like(slots.valid)
            return kvprune.Ranking(score, protected, torch.full((2,), 7))

    cache = ComposedCache([CriticalKV(Looking())])
    with torch.no_grad():
        tiny_model()(**left_padded(prompt(2, 20), [0, 5]), cache=cache)
    for number in range(2):
        valid = seen["columns"][number, 0] >= 0
        row = {
            "held": [seen["columns"][number, h][valid].tolist() for h in range(2)],
            "score": seen["score"][number][:, valid].tolist(),
            "values": seen["values"][number][:, valid].numpy(),
        }
        newest = range(20 - window, 20)
        expected = critical(row, seen["weight"].detach().numpy(), 7, newest)
        columns = cache.columns(0)[number]
        assert [[int(c) for c in head if c >= 0] for head in columns] == expected


def test_floors_sizes_and_bases_are_checked():
    for floor in (-0.1, 1.1, "0.2", True, float("nan")):
        with pytest.raises(KVPruneError, match=r"floor=.*expected a number from 0.0 to 1.0"):
            AdaKV(SnapKV(0.25), floor=floor)
    for size in (0, 2.5, True):
        with pytest.raises(KVPruneError, match="expected tokens, an int of at least 1"):
            ChunkKV(SnapKV(0.25), size=size)
    for base in (TOVA(0.25), StreamingLLM(2, 6)):
        with pytest.raises(KVPruneError, match="keeps one set for all heads"):
            AdaKV(base)
    with pytest.raises(KVPruneError, match="expected a policy that ranks slots"):
        AdaKV(kvprune.policies.FastKV(0.5))


def test_heads_part_and_add_up_to_the_budget():
    """Behind a prompt each layer holds as many slots as the base alone would, heads unlike."""
    cache, unlike = ComposedCache([AdaKV(SnapKV(12, window=2, kernel=3), floor=0.0)]), False
    model = tiny_model()
    with torch.no_grad():
        model(prompt(2, 40), cache=cache)
    for index in range(len(cache)):
        kept = (cache.columns(index) >= 0).sum(-1)
        assert (kept.sum(-1) == 24).all()
        unlike |= bool((kept[:, 0] != kept[:, 1]).any())
    assert unlike


@pytest.mark.parametrize(
    "policies",
    [
        [AdaKV(ExpectedAttention(0.4, sinks=1, future=8, epsilon=0.01))],
        [AdaKV(CriticalKV(SnapKV(0.4, window=2)))],
        [ChunkKV(AdaKV(SnapKV(0.5, window=2)), size=2)],
        [AdaKV(SnapKV(0.5, window=2)) | ChunkKV(Knorm(0.3), size=2)],
    ],
    ids=repr,
)
def test_around_each_other(policies, monkeypatch):
    """In plain `generate`, padded, as each row alone."""
    monkeypatch.setattr(layout, "waste", 0.0)
    model, inputs = tiny_model(), left_padded(prompt(2, 24), [0, 7])
    how, cache = {"max_new_tokens": 6, "do_sample": False}, ComposedCache(policies)
    together = model.generate(**inputs, cache=cache, **how)
    assert any(layer.lanes is not None for layer in cache.layers)
    for row, pad in enumerate([0, 7]):
        ids = inputs["input_ids"][row : row + 1, pad:]
        alone = model.generate(ids, cache=ComposedCache(policies), **how)
        assert torch.equal(alone[0, -6:], together[row, -6:])


@torch.no_grad()
def test_rkv_by_redundancy_alone():
    """Slots in the window that have no candidate beside them score no NaN."""
    cache = ComposedCache([RKV(12, balance=0.0, window=6, when=1)])
    tiny_model()(prompt(1, 30), past_key_values=cache, logits_to_keep=1)
    assert cache.columns(0).shape[-1] == 12


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (RKV, {"budget": 8, "window": 8}, "more tokens than the window"),
    (RKV, {"window": 0}, "window=0"),
    (RKV, {"kernel": 4}, "kernel=4"),
    (RKV, {"balance": 1.5}, "balance=1.5"),
    (RKV, {"similar": -0.1}, "similar=-0.1"),
    (RKV, {"similar": True}, "similar=True"),
    (RKV, {"when": 0}, "when=0"),
    (DMS, {"base": Knorm(), "threshold": math.nan}, "threshold=nan"),
    (DMS, {"base": Knorm(), "threshold": "a"}, "threshold='a'"),
    (DMS, {"base": Knorm(), "threshold": 0.0, "window": 0}, "window"),
    (DMS, {"base": FastKV(), "threshold": 0.0}, "ranks slots"),
]


@pytest.mark.parametrize(("kind", "options", "match"), WRONG, ids=repr)
def test_rkv_and_dms_refuse(kind, options, match):
    """With what was expected, before a cache has read anything."""
    with pytest.raises(KVPruneError, match=match):
        ComposedCache([kind(**options)])


def test_specs_say_them_again():
    """What `repr` prints of a policy is a spec of an equal one."""
    for policy in (
        RKV(64, balance=0.07, when=64),
        DMS(KVzip(0.5, first=(1, 2)), 0.25, window=16),
        KVzip(0.125, plus=True, layers=[1, 2]),
    ):
        assert repr(parse(repr(policy))) == repr(parse(canonical([policy]))) == f"[{policy!r}]"


def test_a_budget_is_set():
    """R-KV's is a share then; a threshold is no budget."""
    policy: Any = RKV().with_budget(0.25)
    assert policy.budget == 0.25 and policy.when == 128
    assert DMS(Knorm(), 0.0).with_budget(0.25) is None
    assert DMS(Knorm(7), 0.0).fixed_budget == 0


def test_dms_reads_no_budget_of_rkv():
    """Nor does a row depend on how long others are; a family without keys is refused in words."""
    inputs: Any = left_padded(prompt(2, 24), [0, 19])
    policy = DMS(RKV(6, window=2, when=1), math.inf, window=3)
    cache, alone = ComposedCache([policy]), ComposedCache([policy])
    kvprune.read(tiny_model(), cache, **inputs)
    kvprune.read(tiny_model(), alone, prompt(2, 24)[1:, 19:])
    ours, theirs = cache.columns(0)[1], alone.columns(0)[0]
    assert [c - 19 for c in ours[0].tolist() if c >= 0] == theirs[0].tolist() == [2, 3, 4]
    with pytest.raises(KVPruneError, match="MLA"):
        kvprune.read(attached_family("deepseek_v3"), ComposedCache([RKV(12)]), prompt(1, 24))
