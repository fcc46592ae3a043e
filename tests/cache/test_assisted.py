"""Drafts that are taken back: assisted and prompt-lookup decoding, recording and `crop`."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune.policies import H2O, StreamingLLM
from kvprune.statistics import Attention
from kvprune.storage.buffers import SLACK

from ..support.models import LAYERS, fresh_model, left_padded, plain_model, prompt, tiny_model
from ..support.strategies import POLICIES, budgets, pipelines, sdtp_pruner, seeds

WAYS = {
    "the model itself drafts": lambda: {"assistant_model": plain_model()},
    "another model drafts": lambda: {"assistant_model": fresh_model(heads=2, kv_heads=1)},
    "an attached model drafts": lambda: {"assistant_model": tiny_model("mistral")},
    "early exit": lambda: {"assistant_early_exit": 2},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
}


class Held:
    """What a cache holds, slots put in order."""

    def __init__(self, cache: kvprune.ComposedCache) -> None:
        self.cache = cache

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Held)
        if self.cache.seen != other.cache.seen:
            return False
        for index in range(len(self.cache)):
            if not torch.equal(self.cache.columns(index), other.cache.columns(index)):
                return False
            for mine, theirs in zip(self._floats(index), other._floats(index), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
        return True

    def _floats(self, index: int) -> list[torch.Tensor]:
        """Keys, values and statistics `[B, Hkv, S, ...]`, oldest first, zero where empty."""
        layer = self.cache.layers[index]
        columns = layer.columns.expand(-1, layer.keys.shape[1], -1)
        most = self.cache.columns(index).shape[-1]
        order = columns.argsort(-1)[..., columns.shape[-1] - most :]
        empty = columns.gather(-1, order) < 0
        statistics = [s.gather(-1, order).masked_fill(empty, 0) for s in layer.statistics.values()]
        place = order[..., None].expand(*order.shape, layer.keys.shape[-1])
        # Keys at positions inside the cache are turned back together at one time or another.
        turned = self.cache.state.positions is not None
        states = [t.gather(2, place) for t in (layer.keys, layer.values)[turned:]]
        return [*(t.masked_fill(empty[..., None], 0) for t in states), *statistics]


def continued(policies, inputs, new, **options):
    """Greedy tokens `[1, columns]` and the cache."""
    cache = kvprune.ComposedCache(policies)
    tokens = tiny_model().generate(**inputs, cache=cache, max_new_tokens=new, **options)
    return tokens, cache


@pytest.mark.parametrize(
    "way", [w if w == "prompt lookup" else pytest.param(w, marks=pytest.mark.slow) for w in WAYS]
)
@given(pipelines(), st.integers(1, 30), st.integers(0, 6), seeds)
def test_drafts_change_no_token(way, chosen, length, padding, seed):
    """The tokens, kept sets and statistics of plain greedy decoding, whoever drafts."""
    policies = [p.make(n) for p, n in zip(*chosen, strict=True)]
    inputs = left_padded(prompt(1, length + padding, seed), [padding])
    expected, plain = continued(policies, inputs, 12)
    tokens, cache = continued(policies, inputs, 12, **WAYS[way]())
    assert torch.equal(tokens, expected)
    assert Held(cache) == Held(plain)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_drafts_are_taken_and_rejected(policy):
    """The tests above mean something: of the drafts some stay and some go, after evictions."""
    taken = []

    class Watch(kvprune.ComposedCache):
        def crop(self, tokens_to_remove):
            taken.append((self.step_count, -tokens_to_remove))
            super().crop(tokens_to_remove)

        def close_step(self, done):
            self.step_count = self.step.count
            super().close_step(done)

    ids = prompt(1, 20).repeat(1, 2)
    for way in WAYS.values():
        cache = Watch([policy.make(10)])
        tiny_model().generate(ids, cache=cache, max_new_tokens=40, **way())
    assert any(gone for _, gone in taken)
    assert any(count > gone + 1 for count, gone in taken[1:])


def read(cache, ids, mask):
    """One forward over new ids, with a mask over all columns."""
    with torch.no_grad():
        return tiny_model()(ids, attention_mask=mask, past_key_values=cache).logits


@given(
    pipelines(), st.integers(1, 12), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data()
)
def test_a_crop_plays_back_what_was_recorded(chosen, length, drafts, data):
    """Rounds of drafts, part of each taken back, equal one token at a time; two rows."""
    policies = [p.make(n) for p, n in zip(*chosen, strict=True)]
    ids = prompt(2, 60, data.draw(seeds))
    mask = left_padded(ids, [0, data.draw(st.integers(0, length - 1))])["attention_mask"]
    cache, plain = kvprune.ComposedCache(policies), kvprune.ComposedCache(policies)
    for one in (cache, plain):
        read(one, ids[:, :length], mask[:, :length])
    cache.activate_past_recording()
    seen = length
    for count in drafts:
        logits = read(cache, ids[:, seen : seen + count], mask[:, : seen + count])
        back = data.draw(st.integers(0, count))
        if back or data.draw(st.booleans()):
            cache.crop(-back)
        for column in range(seen, seen + count - back):
            alone = read(plain, ids[:, column : column + 1], mask[:, : column + 1])
            mine = logits[:, column - seen : column - seen + 1]
            torch.testing.assert_close(mine, alone, rtol=1e-9, atol=1e-10)
        seen += count - back
        assert Held(cache) == Held(plain)
        # Another text, so that what was taken back does not come again.
        ids = torch.cat([ids[:, :seen], prompt(2, 60 - seen, data.draw(seeds))], 1)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_what_is_on_record_moves_with_its_cache(policy):
    """Copies, rows picked out and the end of recording see what is kept, and nothing else."""
    ids, mask = prompt(2, 30), torch.ones(2, 30, dtype=torch.long)
    cache = kvprune.ComposedCache([policy.make(6)])
    read(cache, ids[:, :20], mask[:, :20])
    cache.activate_past_recording()
    read(cache, ids[:, 20:24], mask[:, :24])
    twin, other = copy.deepcopy(cache), copy.deepcopy(cache)
    twin.crop(-3)
    assert twin.seen == 21 and cache.seen == 24 and Held(other) == Held(cache)
    other.batch_select_indices(torch.tensor([1]))
    cache.batch_select_indices(torch.tensor([1]))
    assert Held(other) == Held(cache)
    if policy.bound:
        with pytest.raises(kvprune.KVPruneError, match="at most the 0 columns"):
            other.crop(-1)


def test_what_is_on_record_is_counted():
    """Until it is settled: each draft's record has a copy of the statistics."""
    model, ids, cache = tiny_model(), prompt(1, 30), kvprune.ComposedCache([H2O(4, 4)])
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.activate_past_recording()
        model(ids[:, :5], past_key_values=cache)
    recorded = cache.nbytes
    for layer in cache.layers:
        layer._record.clear()
    # Of 2 heads, five times 8 to 12 slots in float64.
    assert recorded - cache.nbytes >= LAYERS * 2 * 5 * 8 * 8


def test_policies_see_drafts_come_one_by_one():
    """What a policy is shown at a draft does not tell of the drafts behind it."""
    shown = []

    class Watch(kvprune.TokenPolicy):
        def rank_slots(self, slots):
            shown.append((slots.seen, int(slots.columns.max()), slots.prompt_length.tolist()))

    cache = kvprune.ComposedCache([Watch(layers=[2])])
    ids = prompt(1, 20).repeat(1, 2)
    tiny_model().generate(ids, cache=cache, max_new_tokens=9, **WAYS["prompt lookup"]())
    assert shown[0] == (40, 39, [40]) and len(shown) > 9
    assert all(seen == newest + 1 and length == [40] for seen, newest, length in shown)


def test_an_empty_cache_can_record():
    """Everything is taken back: as if nothing had been shown."""
    ids, mask = prompt(1, 12), torch.ones(1, 12, dtype=torch.long)
    cache = kvprune.ComposedCache([H2O(2, 2)])
    cache.activate_past_recording()
    read(cache, ids, mask)
    cache.crop(-12)
    assert cache.seen == 0 and not cache.is_initialized
    logits = read(cache, ids[:, :5], mask[:, :5])
    fresh = kvprune.ComposedCache([H2O(2, 2)])
    for column in range(5):
        expected = read(fresh, ids[:, column : column + 1], mask[:, : column + 1])
    torch.testing.assert_close(logits[:, -1:], expected, rtol=1e-9, atol=1e-10)


def test_recording_ends_with_generate():
    """What follows is treated as ever, and rejected drafts hold no memory."""
    ids = prompt(1, 20).repeat(1, 2)
    cache = kvprune.ComposedCache([StreamingLLM(2, 6)])
    tiny_model().generate(ids, cache=cache, max_new_tokens=9, **WAYS["prompt lookup"]())
    assert all(layer.rectangles[0].capacity <= 8 + SLACK for layer in cache.layers)
    with torch.no_grad():
        tiny_model()(prompt(1, 3), past_key_values=cache)
    with pytest.raises(kvprune.KVPruneError, match="at most the 0 columns"):
        cache.crop(-1)
    assert all(cache.columns(i).shape[-1] == 8 for i in range(LAYERS))


@given(budgets)
def test_a_cache_that_is_not_empty_is_refused(budget):
    """Stock transformers goes wrong there; nothing has changed."""
    cache = kvprune.ComposedCache([sdtp_pruner(0.5), H2O(budget, 2)])
    ids = prompt(1, 20)
    tokens = tiny_model().generate(ids, cache=cache, max_new_tokens=4)
    before = copy.deepcopy(cache)
    with pytest.raises(kvprune.KVPruneError, match="not empty"):
        tiny_model().generate(tokens, cache=cache, **WAYS["prompt lookup"]())
    assert Held(cache) == Held(before)
    again = [tiny_model().generate(tokens, cache=c, max_new_tokens=4) for c in (cache, before)]
    assert torch.equal(*again)


def test_probabilities_of_drafts_are_refused():
    """They are never there as a whole where something is evicted between drafts."""
    cache = kvprune.ComposedCache([StreamingLLM(2, 6)])
    with pytest.raises(kvprune.KVPruneError, match="piece by piece"):
        tiny_model(backend="eager").generate(
            prompt(1, 20),
            cache=cache,
            output_attentions=True,
            return_dict_in_generate=True,
            **WAYS["prompt lookup"](),
        )


@pytest.mark.parametrize("policies", [[], [H2O(4, 4)], [sdtp_pruner(0.6)]], ids=repr)
def test_drafts_in_the_air_were_never_read(policies):
    """A streamer raises before anybody has said which drafts stay: none of them does."""

    class Leaves:
        def __init__(self):
            self.said = []

        def put(self, tokens):
            self.said = [*self.said, *tokens.flatten().tolist()]
            if len(self.said) > 44:
                raise RuntimeError("gone")

        def end(self):
            pass

    ids, streamer = prompt(1, 20).repeat(1, 2), Leaves()
    cache, plain = kvprune.ComposedCache(policies), kvprune.ComposedCache(policies)
    options = {"max_new_tokens": 20, "streamer": streamer, **WAYS["prompt lookup"]()}
    with pytest.raises(RuntimeError, match="gone"):
        tiny_model().generate(ids, cache=cache, **options)
    assert cache.seen < len(streamer.said)
    tiny_model().generate(ids, cache=plain, max_new_tokens=cache.seen - 39)
    assert Held(cache) == Held(plain)


def test_a_crop_beyond_what_was_recorded():
    """Where nothing evicts it goes on behind the record, and local layers stay right."""
    model, ids = tiny_model("mistral-window"), prompt(1, 40)
    cache, plain = kvprune.ComposedCache([]), kvprune.ComposedCache([])
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        model(ids[:, :4], past_key_values=plain)
        cache.activate_past_recording()
        model(ids[:, 6:9], past_key_values=cache)
        cache.crop(-5)
    assert Held(cache) == Held(plain)


def test_what_is_recorded_is_no_prompt():
    """Outside `generate`, shares are of what was read before recording began."""
    ids, mask = prompt(1, 40), torch.ones(1, 40, dtype=torch.long)
    cache, plain = kvprune.ComposedCache([H2O(0.2, 0.2)]), kvprune.ComposedCache([H2O(0.2, 0.2)])
    for one in (cache, plain):
        read(one, ids[:, :20], mask[:, :20])
    cache.activate_past_recording()
    read(cache, ids[:, 20:30], mask[:, :30])
    for column in range(20, 30):
        read(plain, ids[:, column : column + 1], mask[:, : column + 1])
    assert Held(cache) == Held(plain)


def test_a_refused_generate_takes_nothing_back():
    """What was recorded before it began is for its reader to accept or to crop."""
    ids, mask = prompt(1, 12), torch.ones(1, 12, dtype=torch.long)
    cache = kvprune.ComposedCache([H2O(2, 2)])
    read(cache, ids[:, :8], mask[:, :8])
    cache.activate_past_recording()
    read(cache, ids[:, 8:], mask)
    with pytest.raises(kvprune.KVPruneError, match="not empty"):
        tiny_model().generate(prompt(1, 20), cache=cache, **WAYS["prompt lookup"]())
    assert cache.seen == 12


def test_what_only_observes_takes_votes_back():
    """Those of drafts, on record; of other columns they are lost in the sum, which is refused."""
    model, ids = tiny_model(), prompt(1, 30)
    cache = kvprune.ComposedCache(observe=(Attention(),))
    plain = kvprune.ComposedCache(observe=(Attention(),))
    with torch.no_grad():
        for each in (cache, plain):
            model(ids[:, :20], past_key_values=each)
        cache.activate_past_recording()
        model(ids[:, 20:25], past_key_values=cache)
        cache.crop(-5)
    assert Held(cache) == Held(plain)
    with pytest.raises(kvprune.KVPruneError, match="cannot be taken back"):
        cache.crop(-1)
    assert cache.seen == 20
