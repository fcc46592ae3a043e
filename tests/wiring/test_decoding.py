"""More of what `generate` and a forward can be asked for, each against the right oracle."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from kvprune import ComposedCache, KVPruneError
from kvprune.policies import H2O, StreamingLLM
from kvprune.testing.runs import Run, feed

from ..support.models import LAYERS, VOCAB, left_padded, plain_model, prompt, tiny_model
from ..support.strategies import POLICIES, budgets, listed, sdtp_pruner, seeds
from .test_generate import assert_same, generate

EVEN = list(range(0, VOCAB, 2))
MODES: dict[str, dict[str, Any]] = {
    "constrained": {"prefix_allowed_tokens_fn": lambda row, ids: EVEN},
    "constrained beams": {"num_beams": 3, "prefix_allowed_tokens_fn": lambda row, ids: EVEN},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]]},
    "guidance": {"guidance_scale": 1.5},
    "beams of several lengths": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.3},
    "ends early": {"num_beams": 3, "early_stopping": True, "eos_token_id": EVEN, "pad_token_id": 0},
    "rows end apart": {"eos_token_id": EVEN[:20], "pad_token_id": 0},
    "typical sampling": {"do_sample": True, "typical_p": 0.8, "min_p": 0.02},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", [None, *POLICIES], ids=repr)
@pytest.mark.parametrize("padding", [0, 9])
def test_roomy_budgets_equal_dynamic_cache(mode, policy, padding):
    """Modes that transformers 5.23 has built in; it fetches the others from the Hub."""
    inputs, options = left_padded(prompt(2, 23), [0, padding]), {"do_sample": False, **MODES[mode]}
    cache = ComposedCache([policy.roomy()] if policy else [])
    expected = generate(plain_model(), inputs, DynamicCache(), **options)
    assert_same(generate(tiny_model(), inputs, cache, **options), expected)


class Stream(BaseStreamer):
    """Notes what it is handed."""

    def __init__(self) -> None:
        self.tokens, self.ended = list[int](), False

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then token by token."""
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """No more."""
        self.ended = True


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_streamer_is_handed_every_token(policy):
    """As they come, at a full budget."""
    stream = Stream()
    cache = ComposedCache([policy.make(5)])
    tokens = tiny_model().generate(prompt(1, 20), cache=cache, max_new_tokens=9, streamer=stream)
    assert stream.ended and stream.tokens == tokens[0].tolist()


@pytest.mark.parametrize("policies", [[], [StreamingLLM(2, 300)], [sdtp_pruner(1.0)]], ids=repr)
def test_attentions_and_hidden_states_of_roomy_budgets_are_the_dense_ones(policies):
    """In every step; unpadded, since stock eager gives NaN for padding in float64."""
    inputs, options = {"input_ids": prompt(2, 20)}, {"do_sample": False}
    options |= {"output_attentions": True, "output_hidden_states": True, "output_scores": True}
    expected = generate(plain_model(backend="eager"), inputs, DynamicCache(), **options)
    got = generate(tiny_model(backend="eager"), inputs, ComposedCache(policies), **options)
    assert_same(got, expected)
    for name in ("attentions", "hidden_states"):
        for steps in zip(got[name], expected[name], strict=True):
            for mine, dense in zip(*steps, strict=True):
                torch.testing.assert_close(mine, dense, rtol=1e-9, atol=1e-10)


def test_attentions_are_over_the_slots_that_a_layer_held():
    """`[B, Hq, Q, S]`, slots in no order: their sum over all is 1."""
    cache = ComposedCache([StreamingLLM(2, 4)])
    held = []
    for ids in (prompt(2, 20), prompt(2, 1)):
        with torch.no_grad():
            output = tiny_model(backend="eager")(ids, past_key_values=cache, output_attentions=True)
        held.append({a.shape[-1] for a in output.attentions})
        for a in output.attentions:
            torch.testing.assert_close(a.sum(-1), torch.ones_like(a[..., 0]), rtol=1e-6, atol=1e-6)
    assert held == [{20}, {7}]


def test_hidden_states_of_pruned_tokens_end_early():
    """Between layers only the survivors; the last one is whole, and every pruned token has in
    it the state with which it left, normed."""
    model, ids = tiny_model(), prompt(2, 20)
    cache = ComposedCache([sdtp_pruner(0.6)])
    with torch.no_grad():
        output = model(ids, past_key_values=cache, output_hidden_states=True)
    states = output.hidden_states
    counts = [cache.columns(i).shape[-1] for i in range(LAYERS)]
    assert counts[0] > counts[1] > counts[3]
    # What layer i was handed: all that were left after the layer before it.
    assert [s.shape[1] for s in states] == [counts[0], *counts[:-1], 20]
    for row in range(2):
        left = set(range(20)) - set(cache.columns(1)[row, 0].tolist())
        for column in left:
            early = model.model.norm(states[1][row, column])
            torch.testing.assert_close(states[-1][row, column], early, rtol=1e-12, atol=1e-12)


MOVES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0, 0])), [1, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "mask": (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
}


@given(listed, budgets, st.sampled_from(sorted(MOVES)), seeds)
def test_rows_that_are_moved_go_on_as_they_would_have(policy, budget, how, seed):
    """Repeated, selected or reordered: each row's logits and kept sets are those of its origin."""
    made = policy.make(budget)
    if policy.name == "knorm":
        # In the first layer, equal tokens tie but for rounding.
        made = replace(made, layers=range(1, LAYERS))
    ids = prompt(3, 20, seed)
    mask = left_padded(ids, [0, 8, 3])["attention_mask"]
    run = Run(tiny_model(), [made])
    feed(run, ids, mask, [16, 1, 3])
    twin = copy.copy(run)
    twin.cache = copy.deepcopy(run.cache)
    move, rows = MOVES[how]
    move(run.cache)
    assert run.mask is not None
    run.mask, new = run.mask[rows], prompt(3, 6, seed + 1)
    for step in ([0], [1], [2, 3], [4], [5]):
        moved, stayed = run(new[rows][:, step]), twin(new[:, step])
        torch.testing.assert_close(moved, stayed[rows], rtol=1e-10, atol=1e-11)
    for layer in range(LAYERS):
        mine, theirs = run.cache.columns(layer), twin.cache.columns(layer)[rows]
        size = max(mine.shape[-1], theirs.shape[-1])
        mine, theirs = (
            torch.nn.functional.pad(t, (size - t.shape[-1], 0), value=-1) for t in (mine, theirs)
        )
        assert torch.equal(mine, theirs)


# A mask that reaches over earlier turns alone.


@pytest.mark.parametrize("policy", [None, *POLICIES], ids=repr)
@pytest.mark.parametrize("reach", [15, 20])
@pytest.mark.parametrize("new_ids_alone", [False, True])
def test_a_mask_of_earlier_turns_is_extended_with_ones(policy, reach, new_ids_alone):
    """Stock generate fails on it; the tokens are those of the whole mask."""
    model, ids = tiny_model(), left_padded(prompt(2, 15), [0, 6])
    first = ComposedCache([policy.make(8)] if policy else [])
    said = model.generate(**ids, cache=first, max_new_tokens=5, do_sample=False)
    said = torch.cat([said, prompt(2, 4, 1)], 1)
    whole = torch.nn.functional.pad(ids["attention_mask"], (0, 9), value=1)
    reach = min(reach, first.seen) if new_ids_alone else reach
    given_ids = said[:, first.seen :] if new_ids_alone else said
    tokens = []
    for mask in (whole, whole[:, :reach]):
        inputs = {"input_ids": given_ids, "attention_mask": mask, "cache": copy.deepcopy(first)}
        tokens.append(model.generate(**inputs, max_new_tokens=5, do_sample=False))
    assert torch.equal(*tokens)


@pytest.mark.parametrize(("count", "columns", "seen"), [(24, 25, 19), (24, 44, 19), (9, 8, 0)])
def test_a_mask_that_fits_nothing_is_refused(count, columns, seen):
    """One that is too long, or too short where there was no earlier turn."""
    model, cache = tiny_model(), ComposedCache([H2O(4, 4)])
    if seen:
        with torch.no_grad():
            model(prompt(1, seen), past_key_values=cache)
    mask = torch.ones(1, columns, dtype=torch.long)
    with pytest.raises(KVPruneError, match="attention_mask: expected"):
        model.generate(prompt(1, count), attention_mask=mask, cache=cache, max_new_tokens=2)
    assert cache.seen == seen
