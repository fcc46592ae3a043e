"""Queries before rotation on every family: the same wherever a token stands."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import kvprune
from kvprune.policies import ExpectedAttention, SnapKV, StreamingLLM
from kvprune.policy import SlotView
from kvprune.statistics import Queries, QueryMoments, Rotations

from ..support.family_models import FAMILIES, StaysDouble, attached_family
from ..support.models import fresh_model, left_padded, prompt

REFUSED = {
    **dict.fromkeys(("bloom", "falcon", "falcon-alibi", "falcon-new"), "cannot be observed on"),
    "deepseek_v3": "latent keys",
}


def moments(model: Any, cache: Any, **inputs: Any) -> list[Any]:
    """What is held of each layer's queries once the model has read something."""
    with torch.no_grad(), StaysDouble():
        model(**inputs, past_key_values=cache)
    return [layer.records for layer in cache.layers if getattr(layer, "records", None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_query_is_turned_back_to_where_it_came_from(family):
    """A token alone at position 0, which nothing turns, and at position 11: the same queries."""
    model: Any = attached_family(family)
    wanted = QueryMoments(0), Queries(1)
    ids, where = prompt(1, 1), torch.tensor([[11]])
    if family in REFUSED:
        with pytest.raises(kvprune.KVPruneError, match=REFUSED[family]):
            moments(model, kvprune.ComposedCache([], observe=wanted), input_ids=ids)
        return
    caches = [kvprune.ComposedCache([], observe=wanted) for _ in range(2)]
    here = moments(model, caches[0], input_ids=ids)
    if family in ("gpt2", "opt", "gpt_bigcode"):
        # Learned positions are part of the states that queries are made of.
        where = torch.tensor([[0]])
    there = moments(model, caches[1], input_ids=ids, position_ids=where)
    assert here
    for unmoved, moved in zip(here, there, strict=True):
        mean, spread = wanted[0].value(moved[wanted[0]])
        torch.testing.assert_close(mean, unmoved[wanted[1]][0][:, :, 0], rtol=1e-5, atol=1e-6)
        assert not bool(spread.any())


@pytest.mark.parametrize("edges", [(0, 20), (0, 1, 7, 8, 13, 20)])
def test_pieces_and_padding_change_nothing(edges):
    """The moments of a row read alone, in one go, which numpy takes from its queries."""
    model, inputs = attached_family("llama"), left_padded(prompt(2, 20), [0, 6])
    wanted = QueryMoments(3)
    cache = kvprune.ComposedCache([], observe=(wanted,))
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with cache.prompt([20, 14]):
        for start, stop in pairwise(edges):
            found = moments(
                model,
                cache,
                input_ids=inputs["input_ids"][:, start:stop],
                attention_mask=inputs["attention_mask"][:, :stop],
                position_ids=positions[:, start:stop],
            )
    for row, padding in enumerate((0, 6)):
        alone = kvprune.ComposedCache([], observe=(wanted, QueryMoments(0), Queries(20)))
        ids = inputs["input_ids"][row : row + 1, padding:]
        for held, own in zip(found, moments(model, alone, input_ids=ids), strict=True):
            mean, spread = (part[row] for part in wanted.value(held[wanted]))
            expected = wanted.value(own[wanted])
            torch.testing.assert_close(mean, expected[0][0], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(spread, expected[1][0], rtol=1e-9, atol=1e-11)
            # Another count of tokens has other moments.
            assert not torch.allclose(mean, wanted.value(own[QueryMoments(0)])[0][0])


@torch.no_grad()
def test_observing_changes_no_answer():
    """What is known of a layer begins anew with each prompt, whoever else asks."""
    model: Any = attached_family("llama")
    kept = []
    for observe in ((), (QueryMoments(2), Queries(30))):
        cache = kvprune.ComposedCache(
            [ExpectedAttention(12, sinks=2, future=9), SnapKV(11, window=9)], observe=observe
        )
        for seed, count in ((1, 30), (2, 20), (3, 4)):
            model(prompt(1, count, seed), past_key_values=cache, logits_to_keep=1)
        kept.append([cache.columns(layer).tolist() for layer in range(4)])
    assert kept[0] == kept[1]


@torch.no_grad()
def test_moments_are_precise_under_autocast():
    """In float32, the covariance too."""
    model: Any = kvprune.attach(fresh_model(dtype=torch.float32))
    cache = kvprune.ComposedCache([], observe=(QueryMoments(0),))
    with torch.autocast("cpu", torch.bfloat16):
        model(prompt(1, 20), past_key_values=cache, logits_to_keep=1)
    held = cache.layers[0].records[QueryMoments(0)]
    assert [part.dtype for part in held] == [torch.float32] * 3


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    "policies",
    [
        [StreamingLLM(2, 6, positions="cache")],
        [ExpectedAttention(8, sinks=2, future=9)],
        [StreamingLLM(2, 6, positions="cache"), ExpectedAttention(7, sinks=2, future=9)],
    ],
    ids=["inside", "moments", "both"],
)
def test_frequencies_that_a_long_forward_has_stretched(policies):
    """They are read when they are as they were; decoding may run beyond, where nobody looks."""
    model: Any = kvprune.attach(fresh_model(rope_parameters=DYNAMIC, max_position_embeddings=32))
    options: dict[str, Any] = {"do_sample": False}
    model.generate(prompt(1, 40), max_new_tokens=2, **options)
    said = model.generate(
        prompt(1, 24), cache=kvprune.ComposedCache(policies), max_new_tokens=12, **options
    )
    assert said.shape == (1, 36)


class TurnedBack(kvprune.TokenPolicy):
    """Keeps everything, and its keys as they were before rotation."""

    statistics = (Rotations(),)

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[torch.Tensor] = []

    def rank_slots(self, slots: SlotView) -> None:
        """Turns the newest key back."""
        assert slots.scaling == pytest.approx(slots.keys.shape[-1] ** -0.5)
        turn = slots.rotary.angles(-slots.position[:, None, None], slots.keys)
        self.keys.append(slots.rotary.turned(slots.keys[:, :, -1:], *turn))


@torch.no_grad()
def test_rotations_alone_observe_nothing():
    """A token's keys come back to the same wherever it stands, as no record is kept."""
    model, found = attached_family("llama"), []
    for where in (0, 17):
        policy = TurnedBack()
        cache = kvprune.ComposedCache([policy])
        ids, position = prompt(1, 1), torch.tensor([[where]])
        with StaysDouble():
            model(input_ids=ids, position_ids=position, past_key_values=cache)
        assert not any(layer.records for layer in cache.layers)
        found.append(policy.keys)
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)


class Unnamed(kvprune.TokenPolicy):
    """Asks for what it did not name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def rank_slots(self, slots: SlotView) -> None:
        """Asks."""
        getattr(slots, self.name)


@pytest.mark.parametrize("name", ["rotary", "position", "scaling"])
def test_what_must_be_named_first(name):
    """The error says how."""
    cache = kvprune.ComposedCache([Unnamed(name)])
    match = rf"slots.{name}: expected a policy with statistics = \(Rotations\(\)"
    with pytest.raises(kvprune.KVPruneError, match=match):
        attached_family("llama")(prompt(1, 5), past_key_values=cache)
