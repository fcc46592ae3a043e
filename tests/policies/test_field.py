"""The field's methods against plain-Python oracles, which were written from the papers' maths.

Whoever wrote the oracles (support/field_oracles.py) had not seen the policies.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune.policies import (
    DMS,
    H2O,
    RKV,
    TOVA,
    ExpectedAttention,
    FastKV,
    KeyDiff,
    Knorm,
    ObservedAttention,
    PyramidKV,
    Random,
    SnapKV,
)
from kvprune.statistics import Attention, Queries

from ..support import field_oracles as oracles
from ..support import oracles_reading as reading
from ..support.driver import Driver
from ..support.models import LAYERS, fresh_model, left_padded, prompt, tiny_model
from ..support.strategies import chunked, head_counts, seeds

DECODE = 20
History = list[tuple[int, list[list[int]]]]


@dataclass
class Row:
    """One row of a driver, token by token: what an oracle is handed.

    begin: the number of the first token of the prompt that is read, for newest queries.
    padding: the columns before the first token.
    """

    heads: int
    q: Any = None
    k: Any = None
    v: Any = None
    held: list[list[int]] = field(default_factory=list)
    history: History = field(default_factory=list)
    begin: int = 0
    padding: int = 0

    def read(self, q: Any, k: Any, v: Any) -> None:
        """New tokens attend to what is held and to each other."""
        self.held = self.held or [[] for _ in range(self.heads)]
        start = 0 if self.q is None else self.q.shape[1]
        for name, new in (("q", q), ("k", k), ("v", v)):
            before = getattr(self, name)
            both = new.numpy() if before is None else np.concatenate([before, new.numpy()], 1)
            setattr(self, name, both)
        new = list(range(start, self.q.shape[1]))
        self.held = [head + new for head in self.held]
        self.history += [(i, self.held) for i in new]

    def newest(self, count: int, begin: int = 0) -> list[int]:
        """The numbers of the newest queries."""
        return list(range(max(begin, self.q.shape[1] - count), self.q.shape[1]))


Oracle = Callable[[Row], list[set[int]]]

FREQUENCIES = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)


def turn(position: float) -> Any:
    """The matrix `[D, D]` that turns a key by its position: three of four pairs, as RoPE does."""
    found = np.eye(8)
    for i, frequency in enumerate(FREQUENCIES.tolist()):
        angle = position * frequency
        found[i, i] = found[i + 3, i + 3] = np.cos(angle)
        found[i, i + 3], found[i + 3, i] = -np.sin(angle), np.sin(angle)
    return found


def expected_attention(row: Row, budget: int, begin: int, **options: Any) -> list[set[int]]:
    """The oracle's answer, with moments of the queries from number `begin` on."""
    n, sinks = row.q.shape[1], options["sinks"]
    # Here positions are columns.
    back = np.stack([turn(i + row.padding).T for i in range(n)])
    q = np.einsum("nde,hne->hnd", back, row.q)
    skip = max(sinks, begin)
    heads, size = q.shape[0], q.shape[2]
    moments = np.zeros((heads, size)), np.zeros((heads, size, size))
    if skip < n:
        moments = oracles.query_moments(q, skip)
    ahead = np.mean([turn(row.padding + n - 1 + t) for t in range(1, 9)], axis=0)
    return oracles.expected_attention(row.k, row.v, *moments, ahead, row.held, budget, **options)


def rkv(row: Row, budget: int, **options: Any) -> list[set[int]]:
    """The oracle's answer, by head."""
    newest = row.newest(options["window"], row.begin if row.begin else 0)
    found = []
    for head, held in enumerate(row.held):
        group = row.q.shape[0] // row.heads
        queries = row.q[head * group : (head + 1) * group, newest]
        keys, asked = torch.tensor(row.k[head, held]), torch.tensor(queries)
        options["scaling"] = row.q.shape[2] ** -0.5
        found.append(reading.rkv_kept(keys, asked, newest, held, budget, **options))
    return found


# By name: the policy, the oracle, and how the policy's newest queries begin.
METHODS: dict[str, tuple[kvprune.TokenPolicy, Oracle]] = {
    "SnapKV": (
        SnapKV(9, window=4, kernel=5),
        lambda row: oracles.snapkv(row.q, row.k, row.held, row.newest(4, row.begin), 9, 4, 5),
    ),
    "SnapKV average": (
        SnapKV(6, window=3, kernel=3, pooling="average"),
        lambda row: oracles.snapkv(
            row.q, row.k, row.held, row.newest(3, row.begin), 6, 3, 3, "average"
        ),
    ),
    "SnapKV in every step": (
        SnapKV(6, window=2, kernel=1, when=None),
        lambda row: oracles.snapkv(row.q, row.k, row.held, row.newest(2), 6, 2, 1),
    ),
    "TOVA": (TOVA(7), lambda row: oracles.tova(row.q, row.k, row.held, 7)),
    "Knorm": (Knorm(7), lambda row: oracles.knorm(row.k, row.held, 7)),
    "Knorm in every step": (Knorm(5, when=None), lambda row: oracles.knorm(row.k, row.held, 5)),
    "KeyDiff": (KeyDiff(7), lambda row: oracles.keydiff(row.k, row.held, 7)),
    "KeyDiff in every step": (
        KeyDiff(6, when=None),
        lambda row: oracles.keydiff(row.k, row.held, 6),
    ),
    "ObservedAttention": (
        ObservedAttention(7),
        lambda row: oracles.observed_attention(row.q, row.k, row.history, 7),
    ),
    "ExpectedAttention": (
        ExpectedAttention(7, sinks=2, future=8),
        lambda row: expected_attention(row, 7, row.begin, sinks=2),
    ),
    "ExpectedAttention in every step": (
        ExpectedAttention(6, sinks=1, future=8, epsilon=0.02, when=None),
        lambda row: expected_attention(row, 6, row.begin, sinks=1, epsilon=0.02),
    ),
    "R-KV every three": (
        RKV(7, window=2, kernel=3, similar=0.1, when=3),
        lambda row: rkv(row, 7, window=2, balance=0.1, kernel=3, similar=0.1),
    ),
    "R-KV in every step": (
        RKV(6, balance=0.6, window=1, kernel=1, similar=0.0, when=None),
        lambda row: rkv(row, 6, window=1, balance=0.6, kernel=1, similar=0.0),
    ),
    "DMS": (
        DMS(Knorm(1, when=None), -2.5, window=3),
        lambda row: [
            reading.dms_kept(
                {n: -float(np.linalg.norm(row.k[head, n])) for n in held},
                set(),
                row.k.shape[1] - 1,
                -2.5,
                3,
            )
            for head, held in enumerate(row.held)
        ],
    ),
    "ObservedAttention every three": (
        ObservedAttention(7, when=3),
        lambda row: oracles.observed_attention(row.q, row.k, row.history, 7),
    ),
}


def drive(
    policy: Any,
    oracle: Oracle,
    heads: tuple[int, int],
    prompts: list[list[int]],
    padding: list[int],
    seed: int,
    decode: int = DECODE,
) -> None:
    """Reads prompts, each in pieces and followed by single tokens; after each forward, exact sets.

    Args:
        policy, oracle: what is compared.
        heads: query heads, key/value heads.
        prompts: the sizes of each prompt's pieces.
        padding: of each row, in the first piece.
        seed: of the numbers.
        decode: single tokens after each prompt.
    """
    driver = Driver([policy], 2, *heads, seed=seed, frequencies=FREQUENCIES)
    rows = [Row(heads[1], padding=pad) for pad in padding]
    first = list(padding)
    for pieces in prompts:
        for row in rows:
            row.begin = 0 if row.q is None else row.q.shape[1]
        lengths = [sum(pieces) - pad for pad in padding]
        with driver.cache.prompt(lengths) if len(pieces) > 1 else nullcontext():
            for number, count in enumerate(pieces):
                forward(driver, rows, count, padding)
                padding = [0, 0]
                last = number == len(pieces) - 1
                settle(driver, rows, policy, oracle, first, last, 0)
        for since in range(1, decode + 1):
            forward(driver, rows, 1, padding)
            settle(driver, rows, policy, oracle, first, False, since)


def forward(driver: Driver, rows: list[Row], count: int, padding: list[int]) -> None:
    """One forward of the driver, told to each row."""
    tokens = driver.tokens(count)
    driver.step(tokens, padding)
    for number, row in enumerate(rows):
        new = slice(padding[number], None)
        row.read(tokens.q[number, :, new], tokens.k[number, :, new], tokens.v[number, :, new])


def settle(
    driver: Driver,
    rows: list[Row],
    policy: Any,
    oracle: Oracle,
    padding: list[int],
    ends: bool,
    since: int,
) -> None:
    """Asks the oracle where the policy is asked, and compares what is held."""
    due = {None: True, "prompt": ends, 3: ends or (since > 0 and since % 3 == 0)}[policy.when]
    for number, row in enumerate(rows):
        if due:
            row.held = [sorted(kept) for kept in oracle(row)]
        for head in range(row.heads):
            kept = [column - padding[number] for column in driver.kept(number, head)]
            assert kept == row.held[head], (number, head, since)


@pytest.mark.parametrize("name", METHODS)
@given(head_counts, st.integers(1, 24), st.integers(1, 12), st.data(), seeds)
def test_every_step_equals_the_oracle(name, heads, length, second, data, seed):
    """Chunks, left padding, 20 decode steps, a second turn and 20 more: exact sets."""
    policy, oracle = METHODS[name]
    pieces = data.draw(chunked(length))
    padding = [0, data.draw(st.integers(0, pieces[0] - 1))]
    # A forward of one token that was not announced is no prompt.
    prompts = [pieces if len(pieces) > 1 or length > 1 else [2], [second + 1]]
    drive(policy, oracle, heads, prompts, padding, seed)


@pytest.mark.parametrize("over", ["sum", "max", "mean"])
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
@given(head_counts, st.integers(1, 20), st.data(), seeds)
def test_attention_equals_the_oracle(over, decay, heads, length, data, seed):
    """What is accumulated of each slot, within rounding."""
    if over == "mean" and decay != 1:
        with pytest.raises(kvprune.KVPruneError, match="expected decay"):
            Attention(over, decay)
        return
    wanted = Attention(over, decay)
    driver = Driver([], 2, *heads, seed=seed)
    driver.cache.observe = (wanted,)
    driver.reset()
    rows, pieces = [Row(heads[1]) for _ in range(2)], [*data.draw(chunked(length)), 1, 1, 2]
    padding = [0, data.draw(st.integers(0, pieces[0] - 1))]
    for number, count in enumerate(pieces):
        forward(driver, rows, count, padding if number == 0 else [0, 0])
    layer = driver.cache.layers[0]
    held = [layer.statistics[part] for part in wanted.parts]
    got = wanted.value(*held)
    for number, row in enumerate(rows):
        expected = oracles.attention_statistic(row.q, row.k, row.history, over, decay)
        for head, numbers in enumerate(expected):
            columns = layer.columns[number, 0].tolist()
            for column, value in zip(columns, got[number, head].tolist(), strict=True):
                if column >= 0:
                    assert value == pytest.approx(numbers[column - padding[number]], abs=1e-12)


@given(st.integers(8, 40), st.integers(0, 7), st.sampled_from([0.2, 0.35, 0.6, 0.9]), seeds)
def test_budgets_of_a_pyramid_are_exact_and_its_layers_are_snapkv_s(length, padding, share, seed):
    """Layer by layer, as the oracle says; the mean over the layers is the share that was asked."""
    ids = prompt(2, length, seed)
    inputs = left_padded(ids, [0, padding])
    policy = PyramidKV(share, window=2, kernel=3, beta=3)
    cache = kvprune.ComposedCache([policy])
    tiny_model()(**inputs, past_key_values=cache, logits_to_keep=1)
    expected = [
        oracles.pyramid_budgets(oracles._round_half_up(share * n), n, 2, LAYERS, 3)
        for n in (length, length - padding)
    ]
    for layer in range(LAYERS):
        alone = kvprune.ComposedCache([SnapKV(1.0, window=2, kernel=3)])
        alone.policies = (_Fixed([e[layer] for e in expected]),)
        tiny_model()(**inputs, past_key_values=alone, logits_to_keep=1)
        assert torch.equal(cache.columns(layer), alone.columns(layer))
        counts = (cache.columns(layer) >= 0).sum(-1)[:, 0].tolist()
        tokens = (length, length - padding)
        assert counts == [min(max(e[layer], 2), n) for e, n in zip(expected, tokens, strict=True)]
    assert all(
        sum(e) == LAYERS * oracles._round_half_up(share * n)
        for e, n in zip(expected, (length, length - padding), strict=True)
    )


@given(head_counts, st.integers(2, 30), st.data(), st.sampled_from(["max", "average"]), seeds)
def test_fewer_tokens_go_on_where_the_oracle_says(heads, length, data, pooling, seed):
    """FastKV in chunks, in a row with padding, by the queries of the layer before; exact sets."""
    model: Any = fresh_model(heads=heads[0], kv_heads=heads[1])
    policy = FastKV(0.4, layer=2, window=3, kernel=3, pooling=pooling)
    cache = kvprune.ComposedCache([policy], observe=(Queries(100),))
    kvprune.attach(model)
    pieces, before = data.draw(chunked(length)), 0
    padding = data.draw(st.integers(0, pieces[0] - 1))
    inputs = left_padded(prompt(2, length, seed), [0, padding])
    kept: list[list[int]] = [[], []]
    # Queries begin anew with each prompt.
    cache.announce_prompt(torch.tensor([length, length - padding]), length)
    for count in pieces:
        columns = slice(before, before + count)
        new = {"input_ids": inputs["input_ids"][:, columns]}
        mask = inputs["attention_mask"][:, : before + count]
        with torch.no_grad():
            model(**new, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        layer = cache.layers[1]
        queries, _ = layer.records[Queries(100)]
        for row, pad in enumerate((0, padding)):
            n = before + count - pad
            q, k = queries[row, :, -n:].numpy(), layer.keys[row, :, -n:].numpy()
            there: Any = range(max(before - pad, 0), n)
            if count > 1:
                held = [list(range(n))] * heads[1]
                budget = oracles._round_half_up(0.4 * len(there))
                newest, options = range(max(n - 3, 0), n), (3, 3, pooling, None, there)
                there = oracles.fastkv_tokens(q, k, held, newest, budget, *options)
            kept[row] += sorted(c + pad for c in there)
            got = [c for c in cache.columns(2)[row, 0].tolist() if c >= 0]
            assert got == kept[row]
        before += count


class _Fixed(SnapKV):
    """SnapKV with given budgets by row."""

    def __init__(self, budgets: list[int]) -> None:
        super().__init__(1.0, window=2, kernel=3)
        object.__setattr__(self, "budgets", budgets)

    def _budget(self, slots):
        return torch.tensor(self.budgets)  # type: ignore[attr-defined]


def test_chance_is_of_the_token_alone():
    """The same tokens stay beside padding and other rows; another seed keeps others."""
    ids = prompt(1, 60)

    def kept(policy: Random, padding: int = 0) -> list[list[list[int]]]:
        batch = torch.cat([torch.nn.functional.pad(ids, (padding, 0)), prompt(1, 60 + padding, 5)])
        mask = left_padded(batch, [padding, 3])["attention_mask"]
        cache = kvprune.ComposedCache([policy])
        tiny_model()(batch * mask, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        return [
            [[c - padding for c in head.tolist() if c >= 0] for head in cache.columns(layer)[0]]
            for layer in range(LAYERS)
        ]

    assert kept(Random(20)) == kept(Random(20), padding=7)
    assert kept(Random(20)) != kept(Random(20, seed=1))
    flat = [head for layer in kept(Random(20)) for head in layer]
    assert len({tuple(head) for head in flat}) == len(flat) == LAYERS * 2
    assert all(len(head) == 20 for head in flat)
    every = [c for seed in range(40) for layer in kept(Random(20, seed)) for h in layer for c in h]
    counts = np.bincount(every, minlength=60)
    # 320 draws of a third each: six standard deviations are 51.
    assert abs(counts - 320 / 3).max() < 51


def test_keys_of_equal_tokens_tie_in_the_first_layer():
    """Knorm keeps the newer of them, though batches of other sizes round their keys otherwise."""
    model, token = tiny_model(), prompt(1, 1)
    ids = token.expand(1, 12)
    for chunk in (12, 5, 1):
        cache = kvprune.ComposedCache([Knorm(4, when=None)])
        for some in ids.split(chunk, dim=1):
            model(some, past_key_values=cache, logits_to_keep=1)
        assert cache.columns(0).unique().tolist() == [8, 9, 10, 11]


def test_what_is_known_of_queries_is_gone_after_the_prompt():
    """SnapKV holds its slots and nothing of its window; in the second turn it begins anew."""
    model, ids = tiny_model(), prompt(1, 70)
    caches = [kvprune.ComposedCache([p]) for p in (SnapKV(20, window=4), Knorm(20))]
    for cache in caches:
        model(ids[:, :50], past_key_values=cache, logits_to_keep=1)
        assert not any(layer.records for layer in cache.layers)
        model(ids[:, 50:51], past_key_values=cache)
    assert caches[0].nbytes == caches[1].nbytes
    always = kvprune.ComposedCache([SnapKV(20, window=4, when=None)])
    model(ids[:, :50], past_key_values=always, logits_to_keep=1)
    model(ids[:, 50:51], past_key_values=always)
    ((queries, columns),) = (always.layers[0].records[q] for q in (Queries(4),))
    assert queries.shape == (1, 4, 4, 8) and columns.tolist() == [[47, 48, 49, 50]]


@given(st.integers(8, 24), seeds)
def test_tova_behind_heads_that_hold_different_tokens(length, seed):
    """A token's score is the mean over all heads, in whatever order the slots stand."""
    seen = []

    class Noted(TOVA):
        def rank_slots(self, slots):
            """Notes what it is shown and what it answers."""
            answer = super().rank_slots(slots)
            seen.append((slots.columns, slots.statistic(Attention(decay=0.0)), answer.score))
            return answer

    driver = Driver([H2O(2, 4), Noted(5)], 1, 4, 4, seed=seed)
    for count in (length, 1, 1, 1):
        driver.step(driver.tokens(count))
    parted = 0
    for columns, given_to, score in seen:
        heads = columns.expand(-1, 4, -1)[0].tolist()
        parted += columns.shape[1] > 1
        for head, mine in enumerate(score.expand(-1, 4, -1)[0].tolist()):
            for place, column in enumerate(heads[head]):
                if column >= 0:
                    held = [
                        float(given_to[0, h, other.index(column)])
                        for h, other in enumerate(heads)
                        if column in other
                    ]
                    assert mine[place] == pytest.approx(sum(held) / 4, abs=1e-12)
    assert parted


@torch.no_grad()
def test_snapkv_scores_are_a_mean_of_what_its_window_gives():
    """Each query gives 1 in all, so that CriticalKV's epsilon means the same for any window."""
    found = list[torch.Tensor]()

    class Noted(SnapKV):
        def rank_slots(self, slots: Any) -> Any:
            ranking = super().rank_slots(slots)
            others = ranking.score[..., ~slots.newest(self.window)[0, 0]]
            found.append(others)
            return ranking

    model: Any = tiny_model()
    for window in (2, 8):
        found.clear()
        cache = kvprune.ComposedCache([Noted(12, window=window, kernel=1, pooling="average")])
        model(prompt(1, 40), past_key_values=cache)
        total = torch.stack(found).sum(-1)
        assert 0.4 < float(total.min()) <= float(total.max()) < 1
