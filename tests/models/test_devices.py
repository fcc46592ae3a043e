"""Models that `device_map` spreads over several devices: the very numbers of one device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvprune
from kvprune import KVPruneError
from kvprune.evaluation.measure.likelihood import read
from kvprune.evaluation.measure.reader import CacheReader, Reading
from kvprune.evaluation.measure.watch import Watch
from kvprune.policies import H2O, SDTP, StreamingLLM
from kvprune.policies.sdtp import saliency

from ..evaluation.test_reader import Letters
from ..support.family_models import CANNOT_PRUNE, FAMILIES, attached_family, family_model
from ..support.models import fresh_model, left_padded, plain_model, prompt, tiny_model
from ..support.spread import HALVES, spread
from ..support.strategies import sdtp_heads, sdtp_pruner
from ..support.turns import POLICIES, follow
from ..support.two_devices import ONE, ZERO, Devices, MixedDevices, Placed

STEPS = [24, 1, 1, 12, 1]
ALL = {
    **POLICIES,
    "inside": lambda: [StreamingLLM(2, 6, positions="cache")],
    "inside, by places": lambda: [sdtp_pruner(0.6, 3), H2O(4, 7, positions="cache")],
    "union": lambda: [H2O(4, 4) | StreamingLLM(2, 6)],
    "SDTP, asked": lambda: [sdtp_pruner(0.6, 3)],
}


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def most(values: Any, *fast: Any) -> list[Any]:
    """All, of which most are for `make test-all`: a device of the tests takes its time."""
    return [value if value in fast else slow(value) for value in values]


@pytest.fixture(autouse=True)
def one_kernel():
    """The one that torch has for any device."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def devices(monkeypatch):
    """They exist while a test runs; their weights can be read."""
    monkeypatch.setattr(
        "kvprune.models.fingerprint._is_plain",
        lambda weight: isinstance(weight, nn.Parameter | Placed),
    )
    with Devices() as here:
        yield here


def same(mine: Any, theirs: Any) -> None:
    """Logits and what is held, bit for bit."""
    assert torch.equal(mine[0], theirs[0])
    same_cache(mine[1], theirs[1])


def same_cache(mine: kvprune.ComposedCache, theirs: kvprune.ComposedCache) -> None:
    assert mine.seen == theirs.seen
    for (_, here), (_, there) in zip(mine.slot_layers(), theirs.slot_layers(), strict=True):
        assert torch.equal(here.columns.cpu(), there.columns)
        held = zip((here.keys, here.values), (there.keys, there.values), strict=True)
        assert all(torch.equal(a.cpu(), b) for a, b in held)
        for name, value in here.statistics.items():
            assert torch.equal(value.cpu(), there.statistics[name])
        assert {t.device for t in here.tensors()} == {here.keys.device}


@pytest.mark.parametrize("name", most(ALL, "SDTP + H2O", "inside", "inside, by places", "union"))
@pytest.mark.parametrize("padding", most([0, 9], 9))
def test_every_step_is_that_of_one_device(name, padding):
    """And each layer's slots are where the layer is."""
    expected = follow(tiny_model(), ALL[name](), STEPS, [0, padding])
    with Devices():
        found = follow(spread(fresh_model()), ALL[name](), STEPS, [0, padding])
        same(found, expected)
    assert tuple(layer.keys.device for layer in found[1].layers) == HALVES


@pytest.mark.parametrize("layers", [(ZERO, ONE, ZERO, ONE), slow((ONE, ONE, ZERO, ZERO))], ids=str)
def test_layers_in_any_order(layers):
    policies = lambda: [sdtp_pruner(0.6, 3), H2O(4, 7)]  # noqa: E731
    expected = follow(tiny_model(), policies(), STEPS, [0, 9])
    with Devices():
        same(follow(spread(fresh_model(), layers), policies(), STEPS, [0, 9]), expected)


# Nemotron's norms ask torch for the autocast of their device, which it knows for real ones alone.
SPREAD = [family for family in FAMILIES if family != "nemotron"]


@pytest.mark.parametrize("family", most(SPREAD, "bloom", "llama4_text", "qwen3_next"))
def test_families(family):
    def policies() -> list[Any]:
        prunes = [] if family in CANNOT_PRUNE else [sdtp_pruner(0.7)]
        return [*prunes, H2O(4, 7)]

    expected = follow(attached_family(family), policies(), [24, 1, 1], [0, 9])
    with Devices():
        same(follow(spread(family_model(family)), policies(), [24, 1, 1], [0, 9]), expected)


def test_a_bias_that_moves_on_with_positions():
    """ALiBi inside the cache goes by the padding of the rows."""
    policies = [StreamingLLM(2, 6, positions="cache")]
    expected = follow(attached_family("bloom"), policies, [24, 1, 1], [0, 9])
    with Devices():
        same(follow(spread(family_model("bloom")), policies, [24, 1, 1], [0, 9]), expected)


def test_an_index_that_stays_behind_is_noticed(devices):
    """The devices of these tests are worth something."""
    with pytest.raises(MixedDevices, match="lazy:0"):
        torch.ones(3).to(ONE).gather(0, torch.zeros(1, dtype=torch.long, device=ZERO))


@pytest.mark.parametrize("policies", [[H2O(4, 4)], slow([]), slow([StreamingLLM(2, 6)])], ids=repr)
def test_a_decode_step_moves_its_columns_once(policies, devices):
    """Beside what accelerate moves for the stock model."""
    ids = prompt(1, 24).to(ZERO)
    model, counts = spread(fresh_model()), []
    for cache in (None, kvprune.ComposedCache(policies)):
        with torch.no_grad():
            cache = model(ids[:, :20], past_key_values=cache, use_cache=True).past_key_values
            for i in range(20, 24):
                devices.moved.clear()
                model(ids[:, i : i + 1], past_key_values=cache)
        counts.append(sorted(devices.moved))
    stock, mine = counts
    assert mine == sorted([*stock, (1, 1)])


def test_position_data_is_moved_once_for_all_layers(devices):
    """accelerate would move it for each, as it does what the model hands to its layers."""
    model = spread(fresh_model(), (ZERO, ONE, ONE, ONE))
    policy = SDTP(sdtp_heads(stages=1), 0.6, sinks=2, min_tokens=6)
    policy.heads.to(ONE)
    cache = kvprune.ComposedCache([policy])
    with torch.no_grad():
        model(prompt(1, 24).to(ZERO), past_key_values=cache)
    kept = cache.columns(1).shape[-1]
    # Before layer 1 with the hidden states, and once behind it: cosine and sine.
    assert devices.moved.count((1, kept, 8)) == 4


def test_bytes_are_counted_on_every_device(devices):
    """Those of the rows' numbers too, which H2O is told on both."""
    caches = [kvprune.ComposedCache([H2O(4, 7)]) for _ in range(2)]
    for model, cache in zip((spread(fresh_model()), tiny_model()), caches, strict=True):
        with torch.no_grad():
            model(prompt(1, 20).to(model.device), past_key_values=cache)
    assert caches[0].nbytes - caches[1].nbytes == 2 * 8


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 7},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", most(WAYS, "beams"))
@pytest.mark.parametrize("name", ["SDTP + H2O", slow("inside")])
def test_generate(name, way, devices):
    rows = 1 if way == "prompt lookup" else 2
    padded = left_padded(prompt(rows, 24), [0, 7][:rows])
    found = []
    for model in (tiny_model(), spread(fresh_model())):
        policies, home = ALL[name](), model.device
        for policy in policies:
            if isinstance(policy, SDTP):
                policy.heads.to(home)
        cache = kvprune.ComposedCache(policies)
        inputs = {n: t.to(home) for n, t in padded.items()}
        options = {"max_new_tokens": 8, "do_sample": False, **WAYS[way]}
        found.append((model.generate(**inputs, cache=cache, **options).cpu(), cache))
    (theirs, there), (mine, here) = found
    assert torch.equal(mine, theirs)
    same_cache(here, there)


def read_one(model: Any, policies: list[Any]) -> kvprune.ComposedCache:
    """A cache that has read some, padded."""
    return follow(model, policies, [20, 1], [0, 5])[1]


def go_on(model: Any, cache: kvprune.ComposedCache) -> tuple[torch.Tensor, Any]:
    ids = prompt(cache.batch_size, 4, 7).to(model.device)
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits.cpu(), cache


KEPT = {"H2O": lambda: [H2O(4, 7)], "inside": ALL["inside"]}


@pytest.mark.parametrize("name", KEPT)
def test_a_saved_cache_goes_to_where_the_layers_are(name, tmp_path, devices):
    """From one device to several and back: the digest of a model does not know where it is."""
    models = tiny_model(), spread(fresh_model())
    for source, target in (models, models[::-1]):
        cache = read_one(source, KEPT[name]())
        cache.save(tmp_path / "cache")
        loaded = kvprune.ComposedCache.load(tmp_path / "cache", KEPT[name](), target)
        found = [go_on(source, cache), go_on(target, loaded)]
        same(*(found if source is models[1] else found[::-1]))


def test_layers_share_their_columns_on_each_device(tmp_path, devices):
    """One tensor, by which masks are memoised; also where a cache is loaded."""
    model, cache = spread(fresh_model()), kvprune.ComposedCache()
    with torch.no_grad():
        model(prompt(1, 9).to(ZERO), past_key_values=cache)
    cache.save(tmp_path / "cache")
    for held in (cache, kvprune.ComposedCache.load(tmp_path / "cache", [], model)):
        first, second, third, fourth = (layer.held_columns for layer in held.layers)
        assert first is second and third is fourth


@pytest.mark.parametrize("name", KEPT)
def test_rows_and_copies(name, devices):
    """Beams, repeats and a prefix that is reused."""
    found = []
    for model in (spread(fresh_model()), tiny_model()):
        cache = copy.deepcopy(read_one(model, KEPT[name]()))
        cache.reorder_cache(torch.tensor([1, 0], device=model.device))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3], device=model.device))
        found.append(go_on(model, cache))
    same(*found)


def test_columns_are_taken_back(devices):
    found = []
    for model in (spread(fresh_model()), tiny_model()):
        cache = kvprune.ComposedCache([H2O(4, 7)])
        with torch.no_grad():
            model(prompt(1, 20).to(model.device), past_key_values=cache)
            cache.activate_past_recording()
            model(prompt(1, 4, 1).to(model.device), past_key_values=cache)
        cache.crop(-2)
        found.append(go_on(model, cache))
    same(*found)


def test_a_later_mask_hides_slots_on_every_device(devices):
    found = []
    for model in (spread(fresh_model()), tiny_model()):
        cache, mask = kvprune.ComposedCache([H2O(8, 7)]), torch.ones(1, 24, dtype=torch.long)
        mask[:, :6] = 0
        ids = prompt(1, 24).to(model.device)
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
            out = model(ids[:, 20:], past_key_values=cache, attention_mask=mask.to(model.device))
        found.append((out.logits.cpu(), cache))
    same(*found)


def test_tokens_may_come_from_anywhere(devices):
    """From the CPU, with a cache that was on a device: what is held of the rows follows."""
    model, cache = spread(fresh_model()), kvprune.ComposedCache([H2O(4, 7)])
    theirs = kvprune.ComposedCache([H2O(4, 7)])
    padded = left_padded(prompt(2, 24), [0, 5])
    ids, mask = padded["input_ids"], padded["attention_mask"]
    with torch.no_grad():
        for start, stop, device in ((0, 20, ZERO), (20, 22, "cpu"), (22, 24, ONE)):
            given = ids[:, start:stop], mask[:, :stop]
            tokens, now = (t.to(device) for t in given)
            base = model.base_model
            mine = base(tokens, attention_mask=now, past_key_values=cache).last_hidden_state
            there = tiny_model().base_model(
                given[0], attention_mask=given[1], past_key_values=theirs
            )
            assert torch.equal(mine.cpu(), there.last_hidden_state)
    same_cache(cache, theirs)


def test_heads_follow_once(devices):
    """And anew after they were trained on."""
    heads = sdtp_heads()
    assert heads.on(torch.device("cpu")) is heads
    there = heads.on(ONE)
    assert next(there.parameters()).device == ONE and heads.on(ONE) is there
    assert "_elsewhere" not in heads.state_dict() and not list(there._elsewhere)
    with torch.no_grad():
        next(heads.parameters()).add_(1)
    again = heads.on(ONE)
    assert again is not there
    assert torch.equal(next(again.parameters()).cpu(), next(heads.parameters()))


def test_heads_on_no_device_of_the_model(devices):
    cache = kvprune.ComposedCache([SDTP(sdtp_heads(), min_tokens=6)])
    match = r"the heads are on cpu, the model is on lazy:0, lazy:1: .*heads.to\('lazy:0'\)"
    with pytest.raises(KVPruneError, match=match):
        spread(fresh_model())(prompt(1, 9).to(ZERO), past_key_values=cache)


def test_what_a_comparison_reads(devices, monkeypatch):
    """Texts, counts and bytes; the clock waits for every device."""
    waited = list[torch.device]()
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    ids, found = prompt(1, 30)[0].tolist(), []
    for model in (spread(fresh_model()), tiny_model()):
        lead = Reading.of(model, ids, kvprune.ComposedCache([H2O(4, 7)]))
        reader = CacheReader(model, Letters(), lead)
        said = reader.generate(5)
        found.append((said, lead.entered, reader._kept, reader.cache.seen))
    assert found[0] == found[1]
    assert set(waited) == {ZERO, ONE}


def test_what_lm_eval_is_told(devices, monkeypatch):
    """Likelihoods behind contexts of unequal lengths, and how many tokens entered each layer."""
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    contexts, found = [prompt(1, n)[0].tolist() for n in (9, 20)], []
    for model in (spread(fresh_model()), tiny_model()):
        policy = sdtp_pruner(0.6)
        policy.heads.to(model.device)
        cache = kvprune.ComposedCache([policy, H2O(4, 4)])
        with Watch(model, cache, 20) as watch:
            scores = read(model, cache, contexts).score([[3, 4], [5]])
        entered = torch.stack([t.cpu() for t in watch._entered.values()])
        found.append(
            (scores, entered.tolist(), torch.stack([*watch._kept.values()]).cpu().tolist())
        )
    assert found[0] == found[1]


def test_saliency(devices):
    """Each layer's gradients are where the layer is."""
    ids = prompt(1, 9)
    found = saliency(spread(fresh_model()), ids)
    assert found.device == ZERO and torch.equal(found.cpu(), saliency(plain_model(), ids))
