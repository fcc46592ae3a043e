"""Slot layers: what is allocated, what is written in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import kvprune
from kvprune.policies import H2O, StreamingLLM
from kvprune.policy import Ranking, SlotView, TokenPolicy
from kvprune.statistics import Statistic
from kvprune.storage.buffers import SLACK, spare
from kvprune.storage.layer import SlotLayer

from ..support.driver import D, Driver
from ..support.models import fresh_model, left_padded, prompt, tiny_model
from ..support.opcount import OpCount


@pytest.fixture(autouse=True)
def _without_gradients():
    # With them, nothing may be written in place.
    with torch.no_grad():
        yield


@pytest.mark.parametrize("policy", [H2O(10, 10), StreamingLLM(4, 16)], ids=repr)
def test_decode_at_a_full_budget_is_in_place(policy):
    """The new token takes the slot that the previous step freed: the buffers never move."""
    driver = Driver([policy], 2, 4, 2)
    for count in (50, 1):
        driver.step(driver.tokens(count))
    layer = driver.cache.layers[0]
    places = [t.data_ptr() for t in layer.rectangles[0].held.tensors()]
    for _ in range(50):
        driver.step(driver.tokens(1))
        assert [t.data_ptr() for t in layer.rectangles[0].held.tensors()] == places
    assert layer.rectangles[0].capacity == 21
    assert driver.kept(0, 0)[-1] == 100


@pytest.mark.parametrize("policy", [H2O(200, 200), StreamingLLM(4, 396)], ids=repr)
def test_a_decode_step_neither_concatenates_nor_gathers_the_cache(policy):
    """No operator but attention's own makes anything as large as the keys."""
    driver = Driver([policy], 1, 4, 2)
    for count in (500, 1, 1):
        driver.step(driver.tokens(count))
    tokens, keys = driver.tokens(1), 2 * 401 * D
    with OpCount() as ops:
        driver.step(tokens)
    assert ops.big() < keys
    assert ops.big("gather", "index_select", "clone", "copy_") <= 401


@pytest.mark.parametrize("policies", [[], [H2O(300, 300)], [StreamingLLM(4, 600)]], ids=repr)
def test_below_the_budget_buffers_grow_geometrically(policies):
    """So that n steps move O(n) bytes, not O(n^2)."""
    driver, moves, place = Driver(policies, 1, 2, 2), 0, 0
    for _ in range(400):
        driver.step(driver.tokens(1))
        now = driver.cache.layers[0].keys.data_ptr()
        moves, place = moves + (now != place), now
    layer = driver.cache.layers[0]
    assert moves < 60
    assert layer.used == 400 <= layer.rectangles[0].capacity <= 400 + spare(400)


@dataclass(frozen=True)
class Begins(Statistic):
    """A number that no slot changes."""

    reads: ClassVar[str] = "received"
    start: ClassVar[float] = 5.0

    def join(self, held: Tensor, new: Tensor) -> Tensor:
        return held


@dataclass(frozen=True)
class KeepsAll(TokenPolicy):
    """Asks for the number, and has room for everything."""

    statistics = (Begins(),)

    def rank_slots(self, slots: SlotView) -> Ranking:
        return Ranking(slots.statistic(Begins()), torch.zeros_like(slots.valid), slots.tokens(1000))


def test_a_token_in_the_room_behind_the_slots_begins_as_any_other(tmp_path):
    """Also where the room came from a file: nothing is written there when a token comes."""
    model, number = tiny_model(dtype=torch.float32), Begins()
    cache = kvprune.ComposedCache([KeepsAll()])
    for count in (9, 1, 1):
        model(prompt(1, count), past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = cache.load(tmp_path / "cache.safetensors", [KeepsAll()], model)
    for each in (cache, loaded):
        for _ in range(3):
            model(prompt(1, 1), past_key_values=each)
        rectangle = each.layers[0].rectangles[0]
        assert rectangle.capacity > rectangle.used == 14
        assert bool((rectangle.held_numbers[number] == number.start).all())


@pytest.mark.parametrize("policy", [H2O(99, 99), H2O(6, 5), H2O(0.3, 0.1)], ids=repr)
def test_tokens_begin_as_any_other_whatever_went(policy):
    """Slots that were emptied, moved, recorded and taken back, or parted leave nothing behind."""
    model, number = tiny_model(dtype=torch.float32), Begins()
    cache = kvprune.ComposedCache([policy], observe=(number,))

    def check() -> None:
        for layer in cache.layers:
            for one in layer.rectangles:
                there = one.held_columns[..., : one.used].expand(-1, one.heads, -1) >= 0
                room = one.held_numbers[number][..., one.used :]
                assert bool((one.held_numbers[number][..., : one.used][there] == 5).all())
                assert bool((room == 5).all())

    padded = left_padded(prompt(3, 40), [0, 10, 25])
    mask = padded["attention_mask"]
    model(**padded, past_key_values=cache)
    for count, back in ((1, 0), (1, 0), (4, 2), (1, 0), (5, 5), (1, 0), (7, 0), (1, 0)):
        if back:
            cache.activate_past_recording()
        mask = torch.nn.functional.pad(mask, (0, count), value=1)
        model(prompt(3, count), past_key_values=cache, attention_mask=mask)
        check()
        if back:
            cache.crop(-back)
            mask = mask[:, :-back]
            check()
    cache.batch_select_indices(torch.tensor([2]))
    model(prompt(1, 1), past_key_values=cache)
    check()


def test_a_fused_projection_is_not_kept_alive():
    """GPT-NeoX hands in slices of one tensor that is three times as large."""
    fused = torch.randn(1, 2, 30, 3 * D)
    keys, values = fused[..., :D], fused[..., D : 2 * D]
    layer = SlotLayer()
    layer.append(keys, values, torch.arange(30)[None, None], seen=30)
    assert sum(t.untyped_storage().nbytes() for t in layer.tensors()) == 2 * 2 * 30 * D * 4 + 30 * 8


def test_nbytes_counts_all_storage_and_shrinks_after_the_prompt():
    """Dense: K, V and columns of every layer; evicted memory is freed, not masked."""
    model = kvprune.attach(fresh_model(dtype=torch.float32))
    sizes = {}
    for name, policies in {"dense": [], "streaming": [StreamingLLM(4, 16)]}.items():
        cache = kvprune.ComposedCache(policies)
        model(prompt(1, 400), past_key_values=cache)
        sizes[name] = cache.nbytes
    kept = 4 * 2 * 2 * D * 4
    # Layers that hold the same columns share them.
    assert sizes["dense"] == 400 * kept + 400 * 8 + 16
    assert 20 * kept < sizes["streaming"] <= 21 * kept + 4 * 21 * 8 + 16


def test_layers_that_share_columns_part_ways_when_one_drops_a_slot():
    """The columns of a step are one tensor for all layers until a layer drops something."""
    columns = torch.arange(6)[None, None]
    layers = [SlotLayer(), SlotLayer(), SlotLayer()]
    for layer in layers:
        new = torch.randn(1, 2, 6, D)
        layer.append(new, new, columns, seen=6)
    layers[0].free(torch.tensor([[[2]]]))
    layers[1].keep(torch.tensor([[[True, False, True, True, True, True]]]))
    for layer, hole in zip(layers[:2], (2, 1), strict=True):
        new = torch.randn(1, 2, 1, D)
        layer.append(new, new, torch.tensor([[[6]]]), seen=7, in_free_slot=True)
        assert layer.columns[0, 0, hole] == 6
    assert torch.equal(layers[2].columns[0, 0], torch.arange(6))


@pytest.mark.parametrize("over", range(1, SLACK + 3))
def test_a_prompt_that_overflows_the_budget_leaves_no_gaps(over):
    """By however little: a gap would cost a mask in every step from then on."""
    driver = Driver([StreamingLLM(4, 16)], 1, 4, 2)
    driver.step(driver.tokens(20 + over))
    layer = driver.cache.layers[0]
    for _ in range(3):
        driver.step(driver.tokens(1))
        assert not layer.rectangles[0].gaps and layer.used == 21
