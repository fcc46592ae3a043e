"""Positions inside the cache where what is left has gaps, against raw keys turned anew always."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import kvprune
from kvprune.policies import H2O, KeyDiff, StreamingLLM
from kvprune.positions.by_slot import SlotPositions
from kvprune.positions.rotary import Rotation
from kvprune.positions.sinks import SinkPositions
from kvprune.testing import invariants
from kvprune.testing.runs import Case

from ..support.family_models import StaysDouble, attached_family, family_model
from ..support.models import LAYERS, left_padded, prompt, tiny_model
from ..support.naive_cache import Rule, heavy_hitters, sinks_and_window
from ..support.strategies import chunked, pipelines, sdtp_pruner, seeds
from .test_positions import SCALINGS, check_gradients, model_of, our_logits

INSIDE = H2O(3, 4, positions="cache")
STEPS = [15, 4, *[1] * 30]


class RawCache(DynamicCache):
    """Keys as they are before RoPE, oldest first in each head, turned by their place, always.

    One row, whose heads hold equally many. Halves of the first dimensions turn with each other.
    """

    def __init__(self, config: Any, rules: list[Rule], frequencies: torch.Tensor) -> None:
        super().__init__(config=config)
        self.rules, self.frequencies = rules, frequencies.double()
        # By layer and head, the score of each column.
        self.scores: list[list[dict[int, float]]] = [[] for _ in range(config.num_hidden_layers)]

    def turned(self, keys: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Keys `[1, H, n, D]`, each moved on by `by` `[n]`."""
        half = len(self.frequencies)
        angles = by.double()[:, None] * self.frequencies
        cosine, sine = angles.cos(), angles.sin()
        a, b, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine, rest], -1)

    def held(self, layer: int = 0) -> int:
        """Slots of a layer."""
        return self.get_seq_length(layer)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Stores raw keys; returns all of them at their places."""
        before = self.held(layer_idx)
        raw = self.turned(key_states, -torch.arange(before, before + key_states.shape[2]))
        keys, values = super().update(raw, value_states, layer_idx)
        return self.turned(keys, torch.arange(keys.shape[2])), values

    def evict(self, seen: int, count: int, received: Any) -> None:
        """Scores what the new tokens' queries gave, `[1, Hq, Q, S]` by layer, and drops."""
        each: Any = self.layers
        for index, (layer, probabilities) in enumerate(zip(each, received, strict=True)):
            heads = layer.keys.shape[1]
            mass = probabilities[0].sum(1).unflatten(0, (heads, -1)).sum(1)
            scores = self.scores[index] or [{} for _ in range(heads)]
            stay = [self._stay(s, m, seen, count) for s, m in zip(scores, mass, strict=True)]
            places = [
                [sorted(s).index(c) for c in kept] for s, kept in zip(scores, stay, strict=True)
            ]
            order = torch.tensor(places)[None, :, :, None]
            layer.keys = layer.keys.gather(2, order.expand(-1, -1, -1, layer.keys.shape[-1]))
            layer.values = layer.values.gather(2, order.expand(-1, -1, -1, layer.values.shape[-1]))
            both = zip(scores, stay, strict=True)
            self.scores[index] = [{c: s[c] for c in kept} for s, kept in both]

    def _stay(self, scores: dict[int, float], mass: Any, seen: int, count: int) -> list[int]:
        scores.update(dict.fromkeys(range(seen, seen + count), 0.0))
        for column, more in zip(sorted(scores), mass.tolist(), strict=True):
            scores[column] += more
        stay = sorted(scores)
        for rule in self.rules:
            stay = rule(stay, scores, 0)
        return stay


def raw_logits(model: Any, rules: list[Rule], ids: torch.Tensor, steps: list[int]) -> Any:
    """Logits `[1, columns, V]` of one row by the definition; `model` is eager, not attached."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    frequencies = torch.zeros(0) if rotary is None else rotary.inv_freq
    cache, logits, start = RawCache(model.config, rules, frequencies), [], 0
    for count in steps:
        new, held = ids[:, start : start + count], cache.held()
        # Eager attention takes its softmax in float32.
        with torch.no_grad(), StaysDouble():
            out = model(
                new,
                # A model with ALiBi counts what the mask shows, which is what the cache holds.
                attention_mask=torch.ones(1, held + count, dtype=torch.long),
                position_ids=torch.arange(held, held + count)[None],
                past_key_values=cache,
                output_attentions=True,
            )
        logits.append(out.logits)
        cache.evict(start, count, out.attentions)
        start += count
    return torch.cat(logits, 1)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@given(
    st.integers(0, 4),
    st.integers(1, 9),
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    seeds,
)
def test_it_is_what_the_definition_says(heavy, recent, chunks, seed):
    """Grouped-query heads that hold different columns; chunks and then single tokens."""
    steps = [*chunks, *[1] * 20]
    ids = prompt(1, sum(steps), seed)
    rules = [heavy_hitters(heavy, recent)]
    expected = raw_logits(model_of("llama", backend="eager"), rules, ids, steps)
    cache = kvprune.ComposedCache([H2O(heavy, recent, positions="cache")])
    close(our_logits(kvprune.attach(model_of("llama")), cache, ids, steps), expected)
    assert heavy == 0 or cache.columns(0).shape[1] == 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "phi"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_kind_of_rope(family, scaling):
    """Scaled frequencies, and families that turn a part of each key."""
    ids = prompt(1, sum(STEPS))
    eager = model_of(family, scaling, backend="eager")
    expected = raw_logits(eager, [heavy_hitters(3, 4)], ids, STEPS)
    model = kvprune.attach(model_of(family, scaling))
    close(our_logits(model, kvprune.ComposedCache([INSIDE]), ids, STEPS), expected)


@pytest.mark.parametrize("padding", [0, 5])
def test_alibi(padding):
    """BLOOM's bias goes by the place in the cache, by head; also behind padding."""
    ids = prompt(1, sum(STEPS))
    with StaysDouble():
        expected = raw_logits(family_model("bloom", "eager"), [heavy_hitters(3, 4)], ids, STEPS)
        padded = left_padded(torch.cat([ids[:, :padding], ids], 1), [padding])
        model, cache = kvprune.attach(family_model("bloom")), kvprune.ComposedCache([INSIDE])
        steps = [STEPS[0] + padding, *STEPS[1:]]
        got = our_logits(model, cache, padded["input_ids"], steps, padded["attention_mask"])
    close(got[:, padding:], expected)
    assert cache.columns(0).shape[1:] == (4, 7)


MIXED: dict[str, tuple[list[Any], list[Rule]]] = {
    "both ask": (
        [StreamingLLM(1, 7, positions="cache"), INSIDE],
        [sinks_and_window(1, 7), heavy_hitters(3, 4)],
    ),
    "the first asks": (
        [StreamingLLM(1, 7, positions="cache"), H2O(3, 4)],
        [sinks_and_window(1, 7), heavy_hitters(3, 4)],
    ),
    "sinks of two sizes": (
        [StreamingLLM(3, 7), StreamingLLM(1, 5, positions="cache")],
        [sinks_and_window(3, 7), sinks_and_window(1, 5)],
    ),
}


@pytest.mark.parametrize("mixed", MIXED)
def test_several_policies_that_evict(mixed):
    """If one of them asks for it."""
    policies, rules = MIXED[mixed]
    ids = prompt(1, sum(STEPS))
    expected = raw_logits(model_of("llama", backend="eager"), rules, ids, STEPS)
    cache = kvprune.ComposedCache(policies)
    close(our_logits(kvprune.attach(model_of("llama")), cache, ids, STEPS), expected)
    assert isinstance(cache.state.positions, SlotPositions)


class Gaps(StreamingLLM):
    """Says nothing of its window."""

    sinks_before_window = None  # type: ignore[assignment]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "cohere2", "glm4", "smollm3", "bloom"])
def test_both_ways_agree_on_sinks_and_a_window(family):
    """Also where dimensions turn in other pairs, in sliding layers, and in layers without RoPE."""
    logits, ways = [], []
    for policy in (StreamingLLM, Gaps):
        cache = kvprune.ComposedCache([policy(2, 9, positions="cache")])
        with StaysDouble():
            ids = prompt(1, sum(STEPS))
            logits.append(our_logits(attached_family(family), cache, ids, STEPS))
        ways.append(type(cache.state.positions))
    close(*logits)
    assert ways == [SinkPositions, SlotPositions]


def test_a_budget_that_single_tokens_fill():
    """The first slot that goes leaves a hole for the next token, and nothing is moved."""
    ids, logits = prompt(1, 33), []
    for policy in (StreamingLLM, Gaps):
        cache = kvprune.ComposedCache([policy(2, 9, positions="cache")])
        logits.append(our_logits(tiny_model(), cache, ids, [3, *[1] * 30]))
    close(*logits)


class Checked(kvprune.ComposedCache):
    """Compares what attention is handed with the definition, slot by slot."""

    def __init__(self, policies: list[Any]) -> None:
        super().__init__(policies)
        self.raw: dict[tuple[int, int, int, int], torch.Tensor] = {}
        self.checked = 0

    def open_step(self, rows, count, mask, device, positions=None) -> None:
        """A row's first new token stands behind the most that any layer and head holds."""
        held = [layer.columns for layer in self.layers if layer.is_initialized]
        most = [max([0, *((c[row] >= 0).sum(-1).max() for c in held)]) for row in range(rows)]
        super().open_step(rows, count, mask, device, positions)
        for row, columns in enumerate(self.step.columns.tolist()):
            valid = [i for i, column in enumerate(columns) if column >= 0]
            assert self._at(row, valid) == [int(most[row]) + n for n in range(len(valid))]

    def _at(self, row: int, places: list[int]) -> list[int]:
        assert self.step.position_ids is not None
        return [int(self.step.position_ids[row, place]) for place in places]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Raw keys are kept aside, and turned anew."""
        keys, values = super().update(key_states, value_states, layer_idx)
        step, rotation = self.step, self._rotation(layer_idx)
        self.first = step.position_ids[:, 0]
        positions = step.align(step.position_ids, key_states.device)
        back = rotation.turned(key_states, *rotation.angles(-positions[:, None], key_states))
        columns = self.layers[layer_idx].columns.expand(-1, keys.shape[1], -1)
        for row, head in torch.cartesian_prod(*map(torch.arange, keys.shape[:2])).tolist():
            here = {}
            for i, column in enumerate(step.columns[row].tolist()):
                self.raw[layer_idx, row, head, column] = back[row, head, i]
                here[column] = int(positions[row, i])
            self._check(layer_idx, row, head, columns[row, head].tolist(), keys[row, head], here)
        return keys, values

    def _rotation(self, layer: int) -> Any:
        assert isinstance(self.state.positions, SlotPositions)
        return self.state.positions._rotations[layer]

    def _check(self, layer, row, head, columns, keys, here) -> None:
        old = sorted(c for c in columns if c >= 0 and c not in here)
        where = {**here, **{c: int(self.first[row]) - len(old) + i for i, c in enumerate(old)}}
        slots = [i for i, column in enumerate(columns) if column >= 0]
        if not slots:
            return
        raw = torch.stack([self.raw[layer, row, head, columns[i]] for i in slots])[None, None]
        by = torch.tensor([where[columns[i]] for i in slots])[None, None]
        rotation = self._rotation(layer)
        expected = rotation.turned(raw, *rotation.angles(by, raw))[0, 0]
        torch.testing.assert_close(keys[slots], expected, rtol=1e-11, atol=1e-12)
        self.checked += len(old) > 0


@given(pipelines(), st.sampled_from([INSIDE, H2O(50, 50, positions="cache")]), st.data(), seeds)
def test_every_slot_is_where_the_definition_says(chosen, asks, data, seed):
    """Pipelines and unions, pruned prompts, padding, several turns; each layer, row and head."""
    policies = [asks, *(p.make(n) for p, n in zip(*chosen, strict=True))]
    length = data.draw(st.integers(2, 24))
    steps = [*data.draw(chunked(length)), 1, 1, 8, 1, 1]
    ids = prompt(2, sum(steps), seed)
    mask = left_padded(ids, [0, data.draw(st.integers(0, length - 1))])["attention_mask"]
    mask[1, length + 2 + data.draw(st.integers(0, 6))] = 0
    cache = Checked(policies)
    our_logits(tiny_model(), cache, ids, steps, mask)
    assert cache.checked


def test_heads_that_hold_different_numbers_of_slots():
    """A union keeps now more and now fewer; new tokens stand behind the most."""
    cache = Checked([INSIDE | StreamingLLM(2, 5)])
    our_logits(tiny_model(), cache, prompt(2, sum(STEPS)), STEPS)
    counts = (cache.layers[0].columns >= 0).sum(-1)
    assert cache.checked and int(counts.min()) < int(counts.max())


def test_gaps_that_pruning_left_close():
    """Though nothing was evicted; rows lose different numbers, in a later turn too."""
    ids = prompt(2, 30)
    mask = left_padded(ids, [0, 6])["attention_mask"]
    mask[1, 20:23] = 0
    cache = Checked([sdtp_pruner(0.6), H2O(50, 50, positions="cache")])
    our_logits(tiny_model(), cache, ids, [16, 1, 12, 1], mask)
    assert cache.checked and [layer.whole for layer in cache.layers] == [True, False, False, False]


@pytest.mark.parametrize("policies", [[INSIDE], [sdtp_pruner(0.6), INSIDE]], ids=["h2o", "sdtp"])
def test_rows_do_not_depend_on_each_other_nor_on_padding(policies):
    """Three rows, each as alone, though one has not yet filled its budget when others evict."""
    ids, pads = prompt(3, 49), [0, 7, 11]
    mask = left_padded(ids, pads)["attention_mask"]
    model = kvprune.attach(model_of("llama"))
    options = {"logits_to_keep": 1}
    together, start, alone = kvprune.ComposedCache(policies), 0, []
    for row, pad in enumerate(pads):
        cache, now = kvprune.ComposedCache(policies), pad
        for count in (STEPS[0] - pad, *STEPS[1:]):
            with torch.no_grad():
                out = model(ids[row : row + 1, now : now + count], past_key_values=cache, **options)
            alone.append(out.logits[0, -1])
            now += count
    for step, count in enumerate(STEPS):
        with torch.no_grad():
            now = {"attention_mask": mask[:, : start + count], **options}
            got = model(ids[:, start : start + count], past_key_values=together, **now).logits
        close(got[:, -1], torch.stack(alone[step :: len(STEPS)]))
        start += count


@pytest.mark.parametrize("before", [[], [sdtp_pruner(1.0)]], ids=["alone", "behind sdtp"])
def test_a_roomy_budget_changes_nothing(before):
    """With padding inside the mask too; bit for bit, as nothing is turned."""
    ids = prompt(2, 40)
    mask = left_padded(ids, [0, 9])["attention_mask"]
    mask[:, 20:22] = 0
    logits = []
    for positions in ("original", "cache"):
        cache = kvprune.ComposedCache([*before, H2O(50, 50, positions=positions)])
        out = kvprune.attach(model_of("llama")).generate(
            ids * mask,
            attention_mask=mask,
            cache=cache,
            max_new_tokens=9,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits.append(torch.stack(out.logits))
        assert all(layer.whole for layer in cache.layers)
    assert torch.equal(*logits)


@pytest.mark.parametrize(("policy", "budget"), [(INSIDE, 7), (INSIDE | StreamingLLM(2, 5), 14)])
def test_positions_stay_below_the_budget_and_a_chunk(policy, budget):
    """Over some hundred tokens, chunks and single ones."""
    model, cache = kvprune.attach(model_of("llama")), kvprune.ComposedCache([policy])
    watched, stock = [], cache.close_step

    def close_step(done: bool) -> None:
        watched.append((cache.step.count, int(cache.step.position_ids.max())))
        stock(done)

    cache.close_step = close_step  # type: ignore[method-assign]
    steps = [20, *[1] * 100, *[13] * 10, *[1] * 50]
    our_logits(model, cache, prompt(1, sum(steps)), steps)
    assert cache.seen == 300 and len(watched) == len(steps)
    assert all(position < budget + count for count, position in watched)
    for layer in cache.layers:
        assert int(layer.arrived.max()) < budget + 20


@pytest.mark.parametrize("before", [[], [sdtp_pruner(0.6)]], ids=["alone", "behind sdtp"])
def test_copies_rows_files_and_crops_stay_right(before, tmp_path):
    """A copy, rows picked out, a file, and drafts taken back."""
    policies = [*before, H2O(3, 4, positions="cache")]
    model, ids = kvprune.attach(model_of("llama")), prompt(2, 70)
    cache = kvprune.ComposedCache(policies)
    our_logits(model, cache, ids, [20, *[1] * 20])
    twin, picked, drafted = (copy.deepcopy(cache) for _ in range(3))
    cache.save(tmp_path / "cache")
    expected = our_logits(model, cache, ids[:, 40:], [1] * 30)
    loaded = kvprune.ComposedCache.load(tmp_path / "cache", policies, model)
    for other in (twin, loaded):
        assert torch.equal(our_logits(model, other, ids[:, 40:], [1] * 30), expected)
    picked.reorder_cache(torch.tensor([1, 0]))
    swapped = our_logits(model, picked, ids[[1, 0], 40:], [1] * 30)
    torch.testing.assert_close(swapped[[1, 0]], expected, rtol=1e-10, atol=1e-11)
    drafted.activate_past_recording()
    for start in range(40, 70, 3):
        wrong = torch.cat([ids[:, start : start + 3], prompt(2, 4, seed=start)], 1)
        logits = our_logits(model, drafted, wrong, [7])[:, :3]
        drafted.crop(-4)
        close(logits, expected[:, start - 40 : start - 37])


def test_a_file_of_the_other_way_is_refused(tmp_path):
    """Keys there are turned as they came, here with the sinks."""
    model = tiny_model()
    cache = kvprune.ComposedCache([StreamingLLM(2, 4, positions="cache")])
    our_logits(model, cache, prompt(1, 12), [12])
    cache.save(tmp_path / "a")
    for other in (INSIDE, H2O(3, 4)):
        with pytest.raises(kvprune.KVPruneError, match="assign positions in the same way"):
            kvprune.ComposedCache.load(tmp_path / "a", [other], model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_angles_that_are_looked_up_are_those_computed(dtype, monkeypatch):
    """Bit for bit."""
    model, logits = kvprune.attach(model_of("llama", dtype=dtype)), []
    for table in (1 << 12, 0):
        monkeypatch.setattr("kvprune.positions.by_slot.TABLE", table)
        cache = kvprune.ComposedCache([INSIDE])
        logits.append(our_logits(model, cache, prompt(1, sum(STEPS)), STEPS))
        assert bool(list(cache.state.positions.tensors())) == bool(table)
    assert torch.equal(*logits)


def test_layers_that_turn_alike_share_their_angles():
    """Gemma 3 has two kinds of layers."""
    cache = kvprune.ComposedCache([INSIDE])
    with StaysDouble():
        our_logits(attached_family("gemma3_text"), cache, prompt(1, sum(STEPS)), STEPS)
    assert (
        isinstance(cache.state.positions, SlotPositions) and len(cache.state.positions._tables) == 2
    )


def test_it_is_exact_in_float32_however_long_the_stream():
    """Nothing adds up: the error against float64 does not grow."""
    ids, steps = prompt(1, 200), [50, *[1] * 150]
    rules = [heavy_hitters(8, 8)]
    expected = raw_logits(model_of("llama", backend="eager"), rules, ids, steps)
    model = kvprune.attach(model_of("llama", dtype=torch.float32))
    got = our_logits(model, kvprune.ComposedCache([H2O(8, 8, positions="cache")]), ids, steps)
    error = (got.double() - expected).abs().flatten(0, 1).amax(-1)
    assert float(error[150:].mean()) <= 2 * float(error[:50].mean())


def test_a_prompt_turns_nothing(monkeypatch):
    """Not even one that is pruned: its tokens keep the distances that they have in the text."""
    turned = []
    stock = Rotation.turned
    monkeypatch.setattr(Rotation, "turned", lambda *args: turned.append(args) or stock(*args))
    model = kvprune.attach(model_of("llama"))
    cache = kvprune.ComposedCache([sdtp_pruner(0.6), INSIDE])
    cache.bind(model.model._kvprune, model.model)
    turned.clear()
    with torch.no_grad():
        model(prompt(1, 30), past_key_values=cache)
        assert not turned
        model(prompt(1, 1), past_key_values=cache)
        assert len(turned) == LAYERS


def test_gradients_reach_keys_that_were_turned():
    check_gradients(INSIDE, slice(0, 12))


def test_layers_that_nobody_evicts_from_keep_their_positions():
    """They hold the most, which new tokens stand behind: nothing is turned in them."""
    cache = kvprune.ComposedCache([H2O(3, 4, positions="cache", layers=[1])])
    our_logits(kvprune.attach(model_of("llama")), cache, prompt(1, sum(STEPS)), STEPS)
    assert [layer.whole for layer in cache.layers] == [i != 1 for i in range(LAYERS)]
    for layer in cache.layers:
        there = layer.columns >= 0
        assert torch.equal(layer.arrived[there], layer.columns[there].int())


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("inside", [INSIDE, StreamingLLM(2, 4, positions="cache")], ids=repr)
def test_policies_are_shown_keys_where_attention_had_them(inside, seed):
    """Not where they came: drafts come further on, and keys would differ from those without."""
    case = Case((2, 1, 1, 2, 1, 1), (0, 0), "llama", seed, (4, 2))
    invariants.drafts_leave_no_trace([KeyDiff(3, when=None), inside], case)
