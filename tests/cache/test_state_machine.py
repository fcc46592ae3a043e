"""A cache driven through anything that may happen to it, beside a naive one."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvprune
from kvprune.policies import H2O, StreamingLLM
from kvprune.policy.composition import leaves
from kvprune.storage.buffers import SLACK

from ..support.driver import Driver
from ..support.naive_cache import NaiveCache, Rule, above, either, heavy_hitters, sinks_and_window
from ..support.naive_codes import read_back_all
from ..support.strategies import stores
from ..support.uneven import Threshold

MOST_COLUMNS, MOST_ROWS = 40, 4

PIPELINES: list[tuple[list[kvprune.TokenPolicy], list[Rule]]] = [
    ([], []),
    ([H2O(3, 2)], [heavy_hitters(3, 2)]),
    ([H2O(0, 4)], [heavy_hitters(0, 4)]),
    ([StreamingLLM(2, 4)], [sinks_and_window(2, 4)]),
    ([StreamingLLM(1, 7), H2O(2, 3)], [sinks_and_window(1, 7), heavy_hitters(2, 3)]),
    ([H2O(4, 4), StreamingLLM(2, 5)], [heavy_hitters(4, 4), sinks_and_window(2, 5)]),
    ([H2O(2, 2) | StreamingLLM(2, 3)], [either(heavy_hitters(2, 2), sinks_and_window(2, 3))]),
    ([Threshold(0.4, recent=2)], [above(0.4, 2)]),
    ([Threshold(0.4, recent=2), H2O(3, 2)], [above(0.4, 2), heavy_hitters(3, 2)]),
    ([H2O(3, 2, positions="cache")], [heavy_hitters(3, 2)]),
    (
        [StreamingLLM(1, 7), H2O(2, 2, positions="cache") | StreamingLLM(2, 3)],
        [sinks_and_window(1, 7), either(heavy_hitters(2, 2), sinks_and_window(2, 3))],
    ),
]
FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)

counts = st.integers(1, 6)


class CacheMachine(RuleBasedStateMachine):
    """Prompts, decoding, drafts, crops, beams, copies, files and resets, in any order."""

    @initialize(
        chosen=st.sampled_from(PIPELINES),
        rows=st.integers(1, 3),
        heads=st.sampled_from([(2, 2), (4, 2), (4, 1)]),
        seed=st.integers(0, 99),
        grad=st.booleans(),
        store=stores,
        parting=st.booleans(),
    )
    def begin(self, chosen, rows, heads, seed, grad, store, parting):
        policies, rules = chosen
        self.evicts = bool(policies)
        self.bounded = self.evicts and not isinstance(policies[-1], Threshold)
        inside = any(p.positions_in_cache for p in leaves(policies))
        # Inside the cache a store rounds keys before they are turned, and the naive cache does not.
        self.store = None if inside else store
        how = {"seed": seed, "frequencies": FREQUENCIES, "store": self.store, "parting": parting}
        self.driver = Driver(policies, rows, *heads, **how)
        self.naive = NaiveCache(rules, FREQUENCIES.numpy() if inside else None)
        self.recording, self.grad = False, grad

    @property
    def cache(self):
        return self.driver.cache

    def has_room(self):
        return self.naive.seen < MOST_COLUMNS

    def has_tokens(self):
        return self.naive.seen > 0

    def read(self, count, padding):
        tokens = self.driver.tokens(count)
        # Where autograd may watch, nothing is written in place.
        with torch.set_grad_enabled(self.grad):
            got = self.driver.step(tokens, padding)
        arrays = [tokens.q.numpy(), tokens.k.numpy(), tokens.v.numpy()]
        if self.store is not None:
            how = (self.store.group, self.store.rotate)
            for number, bits in enumerate(self.store.each, 1):
                arrays[number] = read_back_all(arrays[number], bits, *how)
        expected = self.naive.read(*arrays, padding, self.recording)
        for row, output in enumerate(expected):
            mine = got[row, padding[row] :].transpose(0, 1)
            torch.testing.assert_close(mine, torch.from_numpy(output), rtol=1e-10, atol=1e-11)

    @precondition(lambda self: not self.has_tokens())
    @rule(count=st.integers(1, 12), data=st.data())
    def first_prompt(self, count, data):
        """Padded on the left."""
        pads = [data.draw(st.integers(0, count - 1)) for _ in range(self.driver.rows)]
        self.read(count, pads)

    @precondition(lambda self: self.has_tokens() and self.has_room())
    @rule(count=counts)
    def several_tokens(self, count):
        self.read(count, [0] * self.driver.rows)

    @precondition(lambda self: self.has_tokens() and self.has_room())
    @rule(count=counts)
    def decode(self, count):
        for _ in range(count):
            self.read(1, [0] * self.driver.rows)

    @precondition(lambda self: self.has_tokens() and not self.recording)
    @rule()
    def record(self):
        self.cache.activate_past_recording()
        self.recording = True

    @precondition(lambda self: self.has_tokens() and self.has_room())
    @rule(count=counts, data=st.data())
    def drafts(self, count, data):
        """Some are accepted."""
        if not self.recording:
            self.record()
        self.read(count, [0] * self.driver.rows)
        self.take_back(data.draw(st.integers(0, count)))

    @precondition(lambda self: self.recording)
    @rule()
    def stop_recording(self):
        self.cache.crop(0)
        self.cache.leave_generate()
        self.recording, self.naive.past = False, []

    @precondition(lambda self: self.has_tokens())
    @rule(count=counts)
    def crop(self, count):
        """Refused where something may have been evicted since."""
        if count >= self.naive.seen:
            return
        if self.evicts and count > len(self.naive.past):
            with pytest.raises(kvprune.KVPruneError, match="cannot come back"):
                self.cache.crop(-count)
            return
        # Columns of a first prompt may be a row's only ones.
        if all(head.first < self.naive.seen - count for row in self.naive.rows for head in row):
            self.take_back(count)

    def take_back(self, count):
        self.cache.crop(-count)
        self.naive.take_back(count)
        columns = self.driver.mask.shape[1] - count
        self.driver.mask = self.driver.mask[:, :columns]

    def pick(self, rows):
        self.naive.pick(rows)
        self.driver.mask = self.driver.mask[rows]
        self.driver.rows = len(rows)

    @precondition(lambda self: self.has_tokens())
    @rule(data=st.data())
    def reorder(self, data):
        """As beam search does."""
        row = st.integers(0, self.driver.rows - 1)
        rows = data.draw(st.lists(row, min_size=self.driver.rows, max_size=self.driver.rows))
        self.cache.reorder_cache(torch.tensor(rows))
        self.pick(rows)

    @precondition(lambda self: self.has_tokens() and self.driver.rows * 2 <= MOST_ROWS)
    @rule()
    def repeat(self):
        self.cache.batch_repeat_interleave(2)
        self.pick([row for row in range(self.driver.rows) for _ in range(2)])

    @precondition(lambda self: self.has_tokens())
    @rule(data=st.data(), by_mask=st.booleans())
    def select(self, data, by_mask):
        size = self.driver.rows
        rows = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
        index = torch.tensor(rows)
        if by_mask:
            index = torch.zeros(size, dtype=torch.bool).scatter(0, index, True)
        self.cache.batch_select_indices(index)
        self.pick(rows)

    @rule(go_on_with_copy=st.booleans())
    def copy(self, go_on_with_copy):
        """The other of the two is used up, which must not be felt."""
        twin = copy.deepcopy(self.cache)
        if go_on_with_copy:
            twin, self.driver.cache = self.driver.cache, twin
        if self.has_tokens():
            twin.batch_select_indices(torch.tensor([0]))
        twin.reset()

    @precondition(lambda self: self.has_tokens())
    @rule()
    def file(self):
        """What was on record is settled; recording goes on where it is asked for."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            self.cache.save(path)
            old = self.driver.cache
            self.driver.cache = kvprune.ComposedCache.load(
                path, old.policies, self.driver.base, self.store
            )
        self.naive.past, self.recording = [], False

    @rule()
    def reset(self):
        self.driver.reset()
        self.naive.forget()
        self.recording = False

    @invariant()
    def same_as_naive(self):
        """Columns, keys, values and statistics, slot by slot."""
        if not hasattr(self, "driver"):
            return
        assert self.cache.seen == self.naive.seen
        for row, heads in enumerate(self.naive.rows):
            for head, naive in enumerate(heads):
                assert self.driver.kept(row, head) == sorted(naive.slots)
                self.same_slots(row, head, naive)

    def same_slots(self, row, head, naive):
        layer = self.cache.layers[0]
        columns = layer.columns[row, head if layer.columns.shape[1] > 1 else 0].tolist()
        for slot, column in enumerate(columns):
            if column >= 0:
                key, value, score = naive.slots[column]
                # What a store reads back was computed.
                most = 0 if self.store is None else 1e-12
                for mine, other in ((layer.keys, key), (layer.values, value)):
                    assert np.abs(mine[row, head, slot].numpy() - other).max() <= most
                for received in layer.statistics.values():
                    assert float(received[row, head, slot]) == pytest.approx(score, rel=1e-9)

    @invariant()
    def memory_is_freed(self):
        """But for what is on record, no layer has room for much more than its budget.

        Padding of a first prompt has slots until something goes: 11, beside a budget of at most 8.
        """
        if not hasattr(self, "driver") or not self.bounded or self.naive.past:
            return
        assert self.cache.layers[0].rectangles[0].capacity <= 11 + 8 + 1 + SLACK


TestCache = CacheMachine.TestCase
TestCache.settings = settings(
    max_examples=10 * settings().max_examples // 2, stateful_step_count=25, deadline=None
)
