"""Layers of several rectangles: bytes, when lanes part and meet again, and what they give."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass

import pytest
import torch

import kvprune
from kvprune import ComposedCache, Quantized
from kvprune.policies import H2O, AdaKV, ExpectedAttention, SnapKV, StreamingLLM
from kvprune.statistics import Attention, Statistic
from kvprune.storage import layout
from kvprune.storage.layout import grouped, rearranged

from ..support.driver import Driver
from ..support.models import fresh_model, left_padded, prompt, tiny_model
from ..support.uneven import Budgets, FirstHead, Threshold


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


# Bytes.


def need(driver: Driver) -> tuple[int, int]:
    """The bytes of what a layer keeps: keys, values, columns and statistics of each row and head.

    Returns:
        these, and the bytes of 8 slots in every row and head.
    """
    layer, groups = driver.cache.layers[0], driver.kv_heads
    held = layer.rectangles[0].held.buffers
    vectors = sum(t.shape[-1] * t.element_size() for t in held)
    kept = (layer.columns >= 0).sum(-1)
    total = int(kept.expand(-1, groups).sum())
    numbers = sum(t.element_size() for t in layer.statistics.values())
    slot = vectors + numbers
    # Where heads keep the same, they share their columns.
    columns = 8 * int(kept.sum())
    each = 8 * (driver.rows * groups * slot + 8 * kept.numel())
    return total * slot + columns, each


def rows_of(sizes: list[int]) -> tuple[Driver, list[int]]:
    """A driver whose rows have prompts of these sizes, and their padding."""
    return Driver([H2O(900, 100)], len(sizes), 4, 2), [max(sizes) - n for n in sizes]


def uneven(name: str) -> tuple[Driver, list[int]]:
    """A layer after its prompt, by name."""
    if name == "one of two heads keeps everything":
        return Driver([FirstHead(20)], 1, 4, 2, dtype=torch.bfloat16), [0]
    if name == "budgets of all kinds":
        budgets = (1000, 901, 700, 333, 90, 88, 20, 4)
        return Driver([Budgets(budgets)], 1, 8, 8, dtype=torch.bfloat16), [0]
    if name == "budgets of all kinds in a store":
        budgets = (1000, 901, 700, 333, 90, 88, 20, 4)
        return Driver([Budgets(budgets)], 1, 8, 8, store=Quantized(8, 4)), [0]
    if name == "budgets that differ a little":
        return Driver([Budgets((1000, 950, 900, 850, 800, 750, 700, 650))], 1, 8, 8), [0]
    return rows_of([1100] + [100] * 7)


NAMES = [
    "one of two heads keeps everything",
    "budgets of all kinds",
    "budgets of all kinds in a store",
    "budgets that differ a little",
    "a row of 1,000 beside seven of 100",
]


@pytest.mark.parametrize("name", NAMES)
def test_bytes_follow_what_is_kept(name: str):
    """At most 5 % or 8 slots more, behind the prompt and while tokens are generated."""
    driver, padding = uneven(name)
    driver.step(driver.tokens(1100), padding)
    for _ in range(60):
        driver.step(driver.tokens(1))
        least, slots = need(driver)
        rows = driver.cache.state.rows
        assert rows is not None
        got = driver.cache.nbytes - sum(t.nbytes for t in rows.tensors())
        padded = driver.cache.state.padding
        got -= 0 if padded is None else padded.nbytes
        assert least < got <= least + max(least // 20, slots)


def test_what_is_even_stays_one_rectangle():
    """Also where rows and heads differ by so little that more operators would cost more."""
    for policy in (H2O(100, 100), StreamingLLM(4, 196), SnapKV(200), Budgets((200, 199))):
        driver = Driver([policy], 2, 4, 2)
        for count in (300, 1, 1, 1):
            driver.step(driver.tokens(count))
        assert driver.cache.layers[0].lanes is None


# When lanes part, and meet.


def test_few_rectangles_that_waste_little():
    assert grouped([1000, 20]) == [[0], [1]]
    assert grouped([20, 1000, 19, 990]) == [[0, 2], [1, 3]]
    assert grouped([5, 5, 5]) == [[0, 1, 2]]
    assert rearranged([[100], [101], [99]], None) is None
    assert rearranged([[100], [10], [99]], None) == (False, [[0, 2], [1]])
    assert rearranged([[100, 10], [100, 9]], None) == (True, [[0, 2], [1, 3]])


def test_lanes_part_and_meet_again():
    """A short row grows to a long one's budget."""
    driver = Driver([StreamingLLM(4, 96)], 2, 4, 2)
    driver.step(driver.tokens(120), [0, 90])
    layer, parted = driver.cache.layers[0], []
    for _ in range(80):
        driver.step(driver.tokens(1))
        parted.append(layer.lanes is not None)
    assert parted[0] and not parted[-1]
    assert sum(a != b for a, b in itertools.pairwise(parted)) == 1


def test_a_growing_head_is_not_copied_in_every_step():
    driver = Driver([FirstHead(20)], 1, 4, 2)
    driver.step(driver.tokens(600))
    places = set()
    for _ in range(100):
        driver.step(driver.tokens(1))
        places.add(driver.cache.layers[0].rectangles[0].held.buffers[0].data_ptr())
    assert len(places) < 20


# What they give is what one rectangle gives.


def generated(policies, waste, monkeypatch, family="llama", store=None, **how):
    """Logits, and the cache, of a padded batch whose rows and heads part, or must not."""
    monkeypatch.setattr(layout, "waste", waste)
    cache = ComposedCache(policies, store=store)
    model = tiny_model(family)
    inputs = left_padded(prompt(3, 30), [0, 20, 6])
    options = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(**inputs, cache=cache, **options, **how)
    parted = [layer.lanes is not None for layer in cache.layers]
    assert any(parted) == (waste < math.inf)
    return found, cache


def check(policies, monkeypatch, family="llama", store=None, waste=0.0, **how):
    got, held = generated(policies, waste, monkeypatch, family, store, **how)
    expected, whole = generated(policies, math.inf, monkeypatch, family, store, **how)
    assert torch.equal(got.sequences, expected.sequences)
    for mine, other in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    for index in range(len(held)):
        assert torch.equal(held.columns(index), whole.columns(index))
    return held


POLICIES = [
    Threshold(0.5, 2),
    FirstHead(5),
    H2O(18, 8),
    StreamingLLM(2, 24),
    H2O(18, 8, positions="cache"),
    StreamingLLM(2, 24, positions="cache"),
    FirstHead(9) | H2O(3, 3),
    AdaKV(SnapKV(12, window=2, kernel=3), floor=0.0),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("store", [None, Quantized(8, 4)], ids=repr)
def test_generate(policy, store, monkeypatch):
    check([policy], monkeypatch, store=store)


@pytest.mark.parametrize("waste", [0.5, 1.0])
@pytest.mark.parametrize("least", [0.3, 0.5, 0.8])
def test_lanes_that_stand_together_though_they_differ_a_little(waste, least, monkeypatch):
    held = check([Threshold(least, 2)], monkeypatch, waste=waste)
    assert any(rectangle.gaps for layer in held.layers for rectangle in layer.rectangles)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 4},
        {"prefill_chunk_size": 7},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "policies",
    [
        [Threshold(0.5, 2)],
        [FirstHead(9), H2O(12, 8)],
        [AdaKV(SnapKV(12, window=2, kernel=3), floor=0.0)],
    ],
    ids=repr,
)
def test_modes_of_generate(how, policies, monkeypatch):
    if "prompt_lookup_num_tokens" in how:
        with monkeypatch.context() as patched:
            one = tiny_model()
            ids = prompt(1, 30)
            both = []
            for waste in (0.0, math.inf):
                patched.setattr(layout, "waste", waste)
                cache = ComposedCache(policies)
                found = one.generate(ids, cache=cache, max_new_tokens=12, **how)
                both.append((found, cache))
            assert both[0][1].layers[0].lanes is not None
            assert torch.equal(both[0][0], both[1][0])
        return
    check(policies, monkeypatch, **how)


@pytest.mark.parametrize(
    "policies",
    [[SnapKV(20, window=3), FirstHead(9)], [ExpectedAttention(20, when=None), FirstHead(9)]],
    ids=repr,
)
def test_policies_that_read_queries_and_keys(policies, monkeypatch):
    """Of a layer that was parted before: with several turns."""
    logits = []
    for waste in (0.0, math.inf):
        monkeypatch.setattr(layout, "waste", waste)
        cache, model = ComposedCache(policies), tiny_model()
        found = []
        for turn in range(3):
            ids = prompt(2, 14, seed=turn)
            found.append(model(ids, cache=cache).logits)
        assert (cache.layers[0].lanes is not None) == (waste == 0.0)
        logits.append(torch.stack(found))
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads", [1, 4])
def test_a_mask_of_the_users_own(heads, monkeypatch):
    """One of all heads together, and one that heads are told apart by."""
    found = []
    for waste in (0.0, math.inf):
        monkeypatch.setattr(layout, "waste", waste)
        cache, model = ComposedCache([FirstHead(5)]), tiny_model()
        model(prompt(2, 20), cache=cache)
        assert (cache.layers[0].lanes is not None) == (waste == 0.0)
        generator = torch.Generator().manual_seed(1)
        shown = torch.rand(2, heads, 3, 23, generator=generator) < 0.7
        shown[..., 20:] = torch.ones(3, 3, dtype=torch.bool).tril()
        lowest = torch.finfo(torch.float64).min
        mask = torch.zeros(shown.shape, dtype=torch.float64).masked_fill(~shown, lowest)
        found.append(model(prompt(2, 3, seed=9), attention_mask=mask, cache=cache).logits)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


# Rows, copies and files.


def parted(monkeypatch, policy=None, store=None):
    """A cache of three rows whose lanes have parted, its model and its mask."""
    monkeypatch.setattr(layout, "waste", 0.0)
    cache, model = ComposedCache([policy or FirstHead(5)], store=store), tiny_model()
    inputs = left_padded(prompt(3, 30), [0, 24, 6])
    model(**inputs, cache=cache)
    assert len(cache.layers[0].rectangles) > 1
    return cache, model, inputs["attention_mask"]


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1], [0], [2, 2, 0, 1, 1], [1, 2]], ids=str)
@pytest.mark.parametrize("policy", [FirstHead(5), H2O(12, 4)], ids=repr)
def test_rows_move(rows, policy, monkeypatch):
    """What each holds afterwards, and what the next step gives, is what it had."""
    cache, model, mask = parted(monkeypatch, policy)
    before = [(layer.columns, layer.keys, layer.statistics) for layer in cache.layers]
    picked = torch.tensor(rows)
    twin = copy.deepcopy(cache)
    twin.batch_select_indices(picked)
    for layer, (columns, keys, statistics) in zip(twin.layers, before, strict=True):
        columns = columns[picked]
        mine, other = layer.columns.sort(-1), columns.sort(-1)
        size = mine.values.shape[-1]
        assert torch.equal(mine.values, other.values[..., -size:])
        assert (other.values[..., :-size] < 0).all()
        for now, was in [
            (layer.keys.sum(-1), keys.sum(-1)),
            *((layer.statistics[p], statistics[p]) for p in statistics),
        ]:
            here = now.gather(-1, mine.indices.expand_as(now))
            there = was[picked].gather(-1, other.indices.expand(-1, was.shape[1], -1))[..., -size:]
            valid = (mine.values >= 0).expand_as(here)
            assert torch.equal(here[valid], there[valid])
    ids, more = prompt(3, 1, seed=4), torch.ones(3, 1, dtype=torch.long)
    whole = torch.cat([mask, more], 1)
    position = whole.cumsum(-1)[:, -1:] - 1
    all_rows = model(ids, attention_mask=whole, position_ids=position, cache=cache).logits
    some = model(
        ids[picked], attention_mask=whole[picked], position_ids=position[picked], cache=twin
    ).logits
    torch.testing.assert_close(some, all_rows[picked], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("store", [None, Quantized(8, 4)], ids=repr)
def test_copies_and_files_go_on_bit_for_bit(store, monkeypatch, tmp_path):
    cache, model, mask = parted(monkeypatch, store=store)
    cache.save(tmp_path / "cache")
    loaded = ComposedCache.load(tmp_path / "cache", cache.policies, model, store)
    copied = copy.deepcopy(cache)
    assert loaded.layers[0].lanes.numbers == cache.layers[0].lanes.numbers
    assert [r.used for r in loaded.layers[0].rectangles] == [
        r.used for r in cache.layers[0].rectangles
    ]
    for _ in range(3):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        how = {"attention_mask": mask, "position_ids": mask.cumsum(-1)[:, -1:] - 1}
        expected = model(prompt(3, 1), cache=cache, **how).logits
        for other in (copied, loaded):
            assert torch.equal(model(prompt(3, 1), cache=other, **how).logits, expected)


def test_no_rows_are_left(monkeypatch):
    """As of one rectangle."""
    cache, _, _ = parted(monkeypatch)
    cache.batch_select_indices(torch.tensor([], dtype=torch.int64))
    assert cache.layers[0].keys.shape[:2] == (0, 2) and cache.layers[0].lanes is None


def test_dividing_a_layer_copies_what_stays_alone(monkeypatch):
    """No rectangle keeps alive what another one needs."""
    cache, _, _ = parted(monkeypatch)
    for layer in cache.layers:
        held = [buffer for each in layer.rectangles for buffer in each.held.buffers]
        for buffer in held:
            assert buffer.untyped_storage().nbytes() == buffer.numel() * buffer.element_size()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_gradients_after_a_prompt_in_inference_mode(family, monkeypatch):
    """Of lanes out of order too; as of one rectangle."""
    found = []
    for waste in (0.0, math.inf):
        monkeypatch.setattr(layout, "waste", waste)
        cache, model = ComposedCache([FirstHead(5)]), kvprune.attach(fresh_model(family))
        with torch.inference_mode():
            model(prompt(2, 20), cache=cache)
        assert (cache.layers[0].lanes is not None) == (waste == 0.0)
        with torch.enable_grad():
            model(prompt(2, 3, seed=1), cache=cache).logits.sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


@dataclass(frozen=True)
class LastOfEach(kvprune.TokenPolicy):
    """One token of each row goes on, in short forwards: the newest that is there."""

    def rank_hidden(self, tokens):
        if tokens.columns.shape[1] > 4:
            return None
        score = tokens.columns[:, None].double()
        one = torch.ones(len(score), dtype=torch.long)
        return kvprune.Ranking(score, torch.zeros_like(score, dtype=torch.bool), one)


def test_pruned_rows_that_have_one_token_each_keep_its_column(monkeypatch):
    """Their columns differ, where a row of a chunk ends in padding."""
    found = []
    for waste in (0.0, math.inf):
        monkeypatch.setattr(layout, "waste", waste)
        cache, model = ComposedCache([LastOfEach(), FirstHead(5)]), tiny_model()
        with cache.prompt([23, 21]):
            model(prompt(2, 20), cache=cache)
            mask = torch.ones(2, 23, dtype=torch.long)
            mask[1, 21:] = 0
            model(prompt(2, 3, seed=2), attention_mask=mask, cache=cache)
        assert (cache.layers[2].lanes is not None) == (waste == 0.0)
        found.append([cache.columns(index) for index in range(len(cache))])
    assert int(found[1][2][1].max()) == 20
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


# What authors and users see.


def test_a_statistic_sees_all_rows_and_heads_at_once(monkeypatch):
    """Also where a layer is several rectangles."""
    shapes = []

    class Most(Statistic):
        reads = "received"
        start = 0.0

        def join(self, before, new):
            shapes.append((before.shape[:2], new.shape[:2]))
            return torch.maximum(before, new)

        def __repr__(self):
            return "Most()"

    monkeypatch.setattr(layout, "waste", 0.0)
    cache = ComposedCache([FirstHead(5)], observe=(Most(),))
    for count in (20, 1, 3):
        tiny_model()(prompt(2, count), cache=cache)
    assert cache.layers[0].lanes is not None
    assert set(shapes) == {((2, 2), (2, 2))}


def test_attentions_are_those_of_one_rectangle(monkeypatch):
    """`output_attentions`, in the order of columns."""
    found = []
    for waste in (0.0, math.inf):
        monkeypatch.setattr(layout, "waste", waste)
        cache, model = ComposedCache([FirstHead(5)]), kvprune.attach(fresh_model(backend="eager"))
        model(prompt(2, 20), cache=cache)
        assert (cache.layers[0].lanes is not None) == (waste == 0.0)
        out = model(prompt(2, 1), cache=cache, output_attentions=True)
        found.append((out.logits, *out.attentions, *map(cache.attended, range(len(cache)))))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_offloaded_layers(monkeypatch):
    cache, _, _ = parted(monkeypatch)
    layer = cache.layers[0]
    before = layer.keys
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, before)


def test_with_policies_after_lanes_parted(monkeypatch):
    """A cache that observed, read once, becomes one of other policies."""
    monkeypatch.setattr(layout, "waste", 0.0)
    model, cache = tiny_model(), ComposedCache(observe=(Attention(),))
    inputs = left_padded(prompt(2, 20), [0, 9])
    model(**inputs, cache=cache)
    twin = cache.with_policies([Threshold(0.5, 2)], model)
    direct = ComposedCache([Threshold(0.5, 2)])
    model(**inputs, cache=direct)
    for index in range(len(direct)):
        assert torch.equal(twin.columns(index), direct.columns(index))
    assert twin.layers[0].lanes is not None
