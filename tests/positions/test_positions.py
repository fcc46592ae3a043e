"""Positions inside the cache, against the paper's way: everything turned anew in every step."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import kvprune
from kvprune.policies import H2O, StreamingLLM
from kvprune.positions.rotary import rotations_of

from ..support.all_families import model_of as any_model
from ..support.family_models import StaysDouble, attached_family, family_model
from ..support.models import LAYERS, fresh_model, left_padded, prompt
from ..support.strategies import sdtp_pruner, seeds

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def model_of(family: str, scaling: str = "default", **options: Any) -> Any:
    """A tiny model with RoPE; head size 8, of which GPT-NeoX turns 2 and Phi 4."""
    more: dict[str, Any] = {}
    if SCALINGS[scaling]:
        part = {"partial_rotary_factor": 0.5} if family in ("gpt_neox", "phi") else {}
        more["rope_parameters"] = {"rope_theta": 10000.0, **part, **SCALINGS[scaling]}
    return fresh_model(family, **more, **options)


class PaperCache(DynamicCache):
    """Section 3.2 and the paper's code: raw keys, turned by their rank among the slots, always.

    One row. Halves of the first `2 * len(frequencies)` dimensions turn with each other; these are
    by layer.
    """

    def __init__(self, sinks: int, window: int, frequencies: list[torch.Tensor]) -> None:
        # Without a config, whose sliding windows would count what was evicted.
        super().__init__()
        self.sinks, self.window = sinks, window
        self.frequencies = [each.double() for each in frequencies]

    def turned(self, keys: torch.Tensor, by: torch.Tensor, layer: int) -> torch.Tensor:
        """Keys `[1, H, n, D]` of a layer, each moved on by `by` `[n]`."""
        half = len(self.frequencies[layer])
        angles = by.double()[:, None] * self.frequencies[layer]
        cosine, sine = angles.cos(), angles.sin()
        a, b, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine, rest], -1)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Stores raw keys; returns all of them at their ranks."""
        before = self.get_seq_length(layer_idx)
        where = torch.arange(before, before + key_states.shape[2])
        raw = self.turned(key_states, -where, layer_idx)
        keys, values = super().update(raw, value_states, layer_idx)
        return self.turned(keys, torch.arange(keys.shape[2]), layer_idx), values

    def evict(self) -> None:
        """Sinks and window stay."""
        each: Any = self.layers
        for layer in each:
            size = layer.keys.shape[2]
            if size > self.sinks + self.window:
                stay = [*range(self.sinks), *range(size - self.window, size)]
                layer.keys, layer.values = layer.keys[:, :, stay], layer.values[:, :, stay]


def frequencies_of(model: Any) -> list[torch.Tensor]:
    """By layer, of its RoPE, each `[R / 2]`; empty where there is none."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return [torch.zeros(0)] * LAYERS
    if hasattr(rotary, "inv_freq"):
        return [rotary.inv_freq] * LAYERS
    return [getattr(rotary, f"{kind}_inv_freq") for kind in model.config.layer_types]


def paper_logits(model: Any, policy: StreamingLLM, ids: torch.Tensor, steps: list[int]) -> Any:
    """Logits `[1, columns, V]` of one row, by the paper; `model` is not attached."""
    cache = PaperCache(policy.sinks, int(policy.window), frequencies_of(model))
    logits, start = [], 0
    for count in steps:
        held = cache.get_seq_length()
        new, where = ids[:, start : start + count], torch.arange(held, held + count)[None]
        with torch.no_grad():
            # A model with ALiBi counts what the mask shows, which is what the cache holds.
            mask = torch.ones(1, held + count, dtype=torch.long)
            out = model(new, attention_mask=mask, position_ids=where, past_key_values=cache)
        logits.append(out.logits)
        cache.evict()
        start += count
    return torch.cat(logits, 1)


def our_logits(
    model: Any, cache: Any, ids: torch.Tensor, steps: list[int], mask: Any = None
) -> Any:
    """Logits `[B, columns, V]` of an attached model."""
    logits, start = [], 0
    for count in steps:
        now = None if mask is None else mask[:, : cache.seen + count]
        with torch.no_grad():
            new = ids[:, start : start + count]
            logits.append(model(new, attention_mask=now, past_key_values=cache).logits)
        start += count
    return torch.cat(logits, 1)


@given(
    st.integers(0, 4),
    st.integers(1, 9),
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    seeds,
)
def test_it_is_what_the_paper_computes(sinks, window, chunks, seed):
    """Chunks and then single tokens, far enough to be anchored anew several times."""
    policy = StreamingLLM(sinks, window, positions="cache")
    steps = [*chunks, *[1] * 60]
    ids = prompt(1, sum(steps), seed)
    expected = paper_logits((model_of("llama")), policy, ids, steps)
    cache = kvprune.ComposedCache([policy])
    got = our_logits(kvprune.attach(model_of("llama")), cache, ids, steps)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
    assert int(cache.state.positions._offset) > 0 or cache.seen < 3 * (sinks + window) + 40


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt_neox", "phi"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_kind_of_rope(family, scaling):
    """Scaled frequencies, and families that turn a part of each key."""
    policy, steps = StreamingLLM(2, 6, positions="cache"), [15, *[1] * 40]
    ids = prompt(1, sum(steps))
    expected = paper_logits((model_of(family, scaling)), policy, ids, steps)
    ours = kvprune.attach(model_of(family, scaling))
    got = our_logits(ours, kvprune.ComposedCache([policy]), ids, steps)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


def test_two_sizes_of_rope_in_one_model():
    """Gemma 4: every other layer has larger heads, of which a part turns."""
    policy, steps = StreamingLLM(2, 6, positions="cache"), [15, *[1] * 40]
    # Nothing slides here.
    models = [family_model("gemma4_text", sliding_window=128) for _ in range(2)]
    assert len({len(frequencies) for frequencies in frequencies_of(models[0])}) == 2
    ids = prompt(1, sum(steps))
    with StaysDouble():
        expected = paper_logits(models[0], policy, ids, steps)
        cache = kvprune.ComposedCache([policy])
        got = our_logits(kvprune.attach(models[1]), cache, ids, steps)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_positions_that_are_not_in_keys(family):
    """Learned ones cannot be moved; nor where a config counts the layers of an encoder."""
    model: Any = kvprune.attach(any_model(family))
    cache = kvprune.ComposedCache([StreamingLLM(2, 6, positions="cache")])
    with pytest.raises(kvprune.KVPruneError, match="cannot be moved"):
        model(prompt(1, 9), past_key_values=cache)


@pytest.mark.parametrize("padding", [0, 5])
def test_alibi(padding):
    """BLOOM's bias goes by the place in the cache; also behind padding."""
    policy, steps = StreamingLLM(2, 6, positions="cache"), [15, *[1] * 40]
    ids = prompt(1, sum(steps))
    with StaysDouble():
        expected = paper_logits(family_model("bloom"), policy, ids, steps)
        padded = left_padded(torch.cat([ids[:, :padding], ids], 1), [padding])
        model = kvprune.attach(family_model("bloom"))
        mask, first = padded["attention_mask"], 15 + padding
        got, cache = tokens_and_state(
            [policy], padded["input_ids"], mask, model, [first, *[1] * 40]
        )
    torch.testing.assert_close(got[:, padding:], expected, rtol=1e-9, atol=1e-10)
    assert cache.columns(0).shape[-1] == 8


def tokens_and_state(policies, ids, mask=None, model=None, steps=(20, *[1] * 40)):
    """Logits, and the cache that they came out of."""
    cache = kvprune.ComposedCache(policies)
    model = kvprune.attach(model_of("llama")) if model is None else model
    return our_logits(model, cache, ids, list(steps), mask), cache


def test_rows_do_not_depend_on_each_other_nor_on_padding():
    """Three rows, each as alone; one has not all of its sinks yet when others evict."""
    policy = StreamingLLM(4, 5, positions="cache")
    ids, pads = prompt(3, 60), [0, 7, 19]
    mask = left_padded(ids, pads)["attention_mask"]
    together, _ = tokens_and_state([policy], ids, mask)
    for row, pad in enumerate(pads):
        alone, _ = tokens_and_state([policy], ids[row : row + 1, pad:], steps=(20 - pad, *[1] * 40))
        torch.testing.assert_close(together[row, pad:], alone[0], rtol=1e-9, atol=1e-10)


def test_it_is_the_same_at_column_four_million():
    """By construction: the same window, as if 4,000,000 tokens had passed through it; float32.

    Against float64 with everything turned anew, the error is that of float32 itself.
    """
    policy, far = StreamingLLM(4, 60, positions="cache"), 4_000_000
    ids = prompt(1, 400)
    expected = paper_logits((model_of("llama")), policy, ids, [100, *[1] * 300])
    model = kvprune.attach(model_of("llama", dtype=torch.float32))
    cache = kvprune.ComposedCache([policy])
    near = our_logits(model, cache, ids[:, :250], [100, *[1] * 150])
    inside: Any = cache.state.positions
    cache.state.seen += far
    inside._offset = inside._offset + far
    for layer in cache.layers:
        (slots,) = layer.rectangles
        held = slots.held_columns
        slots.held_columns = torch.where(held >= 4, held + far, held)
    rest = our_logits(model, cache, ids[:, 250:], [1] * 150)
    assert int(cache.columns(0).max()) == far + 399 and int(inside._offset) > far
    got = torch.cat([near, rest], 1).double()
    error = (got - expected).abs().flatten(0, 1).amax(-1)
    assert float(error[250:].mean()) <= 2 * float(error[:100].mean())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "phi", "gemma3_text"])
def test_how_a_layer_turns_its_keys_is_found_by_trial(family):
    """The part that is turned, with its frequencies."""
    turned = {"gpt_neox": 2, "phi": 4}.get(family, 8)
    for rotation in rotations_of(fresh_model(family, head_dim=8).base_model):
        assert rotation is not None and not rotation.interleaved and rotation.start == 0
        assert 2 * len(rotation.frequencies) == turned


def test_layers_without_positions_are_left_alone():
    """SmolLM3 turns no keys in every fourth layer."""
    model = fresh_model("smollm3")
    turned = [rotation is not None for rotation in rotations_of(model.base_model)]
    assert turned == [bool(uses) for uses in model.config.no_rope_layers]
    assert not all(turned)


@pytest.mark.parametrize("policy", [StreamingLLM, H2O])
@pytest.mark.parametrize("family", ["gpt2", "opt", "falcon-alibi", "qwen3_next"])
def test_models_without_relative_positions_are_refused(family, policy):
    """Before anything is changed."""
    model: Any = attached_family(family)
    cache = kvprune.ComposedCache([policy(2, 5, positions="cache")])
    with pytest.raises(kvprune.KVPruneError, match="positions='original'"), StaysDouble():
        model.generate(prompt(1, 9), cache=cache, max_new_tokens=2)
    assert not cache.is_initialized and len(cache) == 0


def test_a_mask_that_hides_sinks_which_were_seen_is_refused():
    """Before anything is changed; others can be hidden, and with original positions any."""
    model, ids, mask = kvprune.attach(model_of("llama")), prompt(1, 12), torch.ones(1, 10)
    for hidden, positions, fine in ((1, "cache", False), (5, "cache", True), (1, "original", True)):
        cache = kvprune.ComposedCache([StreamingLLM(3, 8, positions=positions)])
        later = mask.clone()
        later[:, hidden] = 0
        with torch.no_grad():
            model(ids[:, :9], past_key_values=cache)
            if not fine:
                with pytest.raises(kvprune.KVPruneError, match=r"hides columns \[1\].*rows \[0\]"):
                    model(ids[:, 9:10], attention_mask=later, past_key_values=cache)
                assert cache.seen == 9 and 1 in cache.columns(0)
                later = mask
            model(ids[:, 9:10], attention_mask=later, past_key_values=cache)
        assert cache.seen == 10


def test_bad_input():
    """Names the argument."""
    for policy in (StreamingLLM, H2O):
        with pytest.raises(kvprune.KVPruneError, match=f"^{policy.__name__}: positions='paper'"):
            policy(positions="paper")


@pytest.mark.parametrize(
    "policy", [StreamingLLM(2, 5, positions="cache"), H2O(3, 4, positions="cache")], ids=repr
)
def test_where_frequencies_change_positions_end(policy):
    """Refused with the way out, which then works."""
    model = kvprune.attach(model_of("llama", "dynamic"))
    cache = kvprune.ComposedCache([policy])
    with pytest.raises(kvprune.KVPruneError, match="reach 512"), torch.no_grad():
        model(prompt(1, 513), past_key_values=cache)
    tokens = model.generate(prompt(1, 600), cache=cache, prefill_chunk_size=50, max_new_tokens=3)
    assert tokens.shape == (1, 603) and cache.columns(0).shape[-1] == 7


@pytest.mark.parametrize("before", [[], [sdtp_pruner(0.6)]], ids=["alone", "behind sdtp"])
def test_copies_rows_and_crops_stay_right(before):
    """A copy, rows picked out, and drafts taken back, each after being anchored anew."""
    policies = [*before, StreamingLLM(2, 5, positions="cache")]
    model, ids = kvprune.attach(model_of("llama")), prompt(2, 90)
    _, cache = tokens_and_state(policies, ids, model=model)
    assert int(cache.state.positions._offset.min()) > 0
    twin, picked, drafted = (copy.deepcopy(cache) for _ in range(3))
    expected = our_logits(model, cache, ids[:, 60:], [1] * 30)
    torch.testing.assert_close(our_logits(model, twin, ids[:, 60:], [1] * 30), expected)
    picked.reorder_cache(torch.tensor([1, 0]))
    swapped = our_logits(model, picked, ids[[1, 0], 60:], [1] * 30)
    torch.testing.assert_close(swapped[[1, 0]], expected, rtol=1e-10, atol=1e-11)
    drafted.activate_past_recording()
    for start in range(60, 90, 3):
        wrong = torch.cat([ids[:, start : start + 3], prompt(2, 4, seed=start)], 1)
        logits = our_logits(model, drafted, wrong, [7])[:, :3]
        drafted.crop(-4)
        where = slice(start - 60, start - 57)
        torch.testing.assert_close(logits, expected[:, where], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("before", [[], [sdtp_pruner(0.6)]], ids=["alone", "behind sdtp"])
def test_a_roomy_window_changes_nothing(before):
    """With padding inside the mask too; bit for bit, as nothing is turned."""
    ids = prompt(2, 40)
    mask = left_padded(ids, [0, 9])["attention_mask"]
    mask[:, 20:22] = 0
    logits = []
    for positions in ("original", "cache"):
        cache = kvprune.ComposedCache([*before, StreamingLLM(4, 100, positions=positions)])
        model = kvprune.attach(model_of("llama"))
        out = model.generate(
            ids * mask,
            attention_mask=mask,
            cache=cache,
            max_new_tokens=9,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits.append(torch.stack(out.logits))
    assert torch.equal(*logits)


def test_only_the_sinks_are_held_twice():
    """Memory: the slots of the window, and the sinks' keys as they came."""
    sizes = []
    for positions in ("original", "cache"):
        _, cache = tokens_and_state([StreamingLLM(4, 12, positions=positions)], prompt(1, 60))
        sizes.append(cache.nbytes)
    layer = cache.layers[0]
    sinks = LAYERS * layer.keys.shape[1] * 4 * layer.keys.shape[-1] * 8
    assert sizes[0] + sinks <= sizes[1] <= sizes[0] + sinks + 8 * (2 * LAYERS + 1)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])
def test_layers_that_hold_other_columns_are_arranged_by_themselves(family):
    """Sliding layers lose their sinks, full ones do not: nothing is shared between the two."""
    ids, logits = prompt(1, 60), []
    for share in (True, False):
        cache = kvprune.ComposedCache([StreamingLLM(2, 16, positions="cache")])
        for start, stop in [(0, 20), *((i, i + 1) for i in range(20, 60))]:
            if not share and cache.state.positions is not None:
                cache.state.positions._placement = _alone(cache.state.positions)  # type: ignore[method-assign]
            with torch.no_grad(), StaysDouble():
                new = ids[:, start:stop]
                out = attached_family(family)(new, past_key_values=cache)
        logits.append(out.logits)
    assert torch.equal(*logits)


def _alone(inside: Any) -> Any:
    """`_placement` that remembers nothing of another layer."""
    stock = type(inside)._placement

    def placement(at: Any, columns: torch.Tensor) -> Any:
        at.step.notes.clear()
        return stock(inside, at, columns)

    return placement


def test_an_empty_layer():
    """A chunked layer holds nothing once its chunk has ended."""
    cache = kvprune.ComposedCache([StreamingLLM(2, 5, positions="cache")])
    with torch.no_grad(), StaysDouble():
        for column in range(40):
            ids = prompt(1, 40)[:, column : column + 1]
            attached_family("llama4_text")(ids, past_key_values=cache)
    assert cache.seen == 40


def test_the_trial_is_not_misled():
    """By a token whose embedding is zero, by a large bias in half precision, by training mode."""
    assert all(rotations_of(fresh_model(pad_token_id=1).base_model))
    options: dict[str, Any] = {"heads": 2, "kv_heads": 1, "hidden_size": 128}
    model: Any = fresh_model("qwen2", dtype=torch.bfloat16, initializer_range=0.05, **options)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[-1] = 100.0
    assert all(rotations_of(model.base_model))
    trained = fresh_model("llama", attention_dropout=0.5).train()
    assert all(rotations_of(trained.base_model)) and trained.model.layers[0].training


def check_gradients(
    policy: kvprune.TokenPolicy,
    tokens: slice,
    family: str = "llama",
    ends: tuple[int, ...] = (12, 20),
    padding: tuple[int, ...] = (0,),
) -> None:
    """Those of the last forward, at some tokens of earlier ones, by a finite difference."""
    model, rows = kvprune.attach(model_of(family)), len(padding)
    ids = prompt(rows, ends[-1])
    mask = left_padded(ids, list(padding))["attention_mask"]
    states = model.get_input_embeddings()(ids).detach()

    def loss(states: torch.Tensor) -> torch.Tensor:
        cache, outputs = kvprune.ComposedCache([policy]), []
        for start, end in pairwise((0, *ends)):
            new = states[:, start:end]
            now = mask[:, :end]
            outputs.append(model(inputs_embeds=new, attention_mask=now, past_key_values=cache))
        return outputs[-1].logits.square().sum()

    way = torch.zeros_like(states)
    way[:, tokens] = torch.randn(way[:, tokens].shape, dtype=torch.float64)
    tracked = states.clone().requires_grad_()
    loss(tracked).backward()
    assert tracked.grad is not None
    slope = (loss(states + 1e-6 * way) - loss(states - 1e-6 * way)) / 2e-6
    torch.testing.assert_close((tracked.grad * way).sum(), slope.detach(), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_sinks():
    check_gradients(StreamingLLM(2, 6, positions="cache"), slice(0, 2))


def test_gradients_where_sinks_have_gone():
    """Several at once, out of a sliding window: no slot is written to more than once."""
    policy = StreamingLLM(4, 30, positions="cache")
    ends = (16, *range(17, 29))
    check_gradients(policy, slice(8, 24), "mistral-window", ends)


def test_gradients_where_a_row_is_shorter_than_the_sinks():
    """Its sinks to come are in no slot yet, while those of the other row are turned."""
    policy = StreamingLLM(4, 3, positions="cache")
    check_gradients(policy, slice(0, 12), ends=(9, 12, 13), padding=(0, 10))
