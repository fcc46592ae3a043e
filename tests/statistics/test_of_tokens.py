"""Numbers of tokens: how far they came through pruning, and what a module says of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import kvprune
from kvprune import ComposedCache, KVPruneError, Ranking
from kvprune.policies import H2O, FastKV
from kvprune.policy import OneBudget, SlotView, TokenView
from kvprune.statistics import Gate, Statistic, Survival

from ..support.models import LAYERS, left_padded, prompt, tiny_model
from ..support.strategies import chunked, sdtp_pruner, seeds


class Noted(kvprune.TokenPolicy):
    """A policy that prunes, of whose answers notes are taken."""

    def __init__(self, base: kvprune.TokenPolicy) -> None:
        super().__init__()
        self.base, self.notes = base, list[tuple[TokenView, Ranking]]()

    @property
    def statistics(self) -> Any:
        """The statistics of the base."""
        return self.base.statistics

    def for_model(self, model: nn.Module) -> Noted:
        """The same around what the base is there."""
        self.base = self.base.for_model(model)
        return self

    def rank_hidden(self, tokens: TokenView) -> Ranking | None:
        """The answer of the base."""
        answer = self.base.rank_hidden(tokens)
        if answer is not None:
            self.notes.append((tokens, answer))
        return answer


def judgements(notes: list[tuple[TokenView, Ranking]], row: int) -> dict[int, float]:
    """By column, what the definition says, of the stages of one forward."""
    found: dict[int, float] = {}
    for stage, (tokens, ranking) in enumerate(notes):
        there = [
            (float(ranking.score[row, 0, i]), int(column))
            for i, column in enumerate(tokens.columns[row])
            if tokens.valid[row, i]
        ]
        for place, (_, column) in enumerate(sorted(there)):
            found[column] = stage + place / len(there)
    return found


@given(st.integers(8, 30), st.data(), seeds)
@torch.no_grad()
def test_how_far_a_token_came(length, data, seed):
    """Stages and ranks, by the definition; in chunks, beside padding, in every layer."""
    pieces = data.draw(chunked(length))
    padding = data.draw(st.integers(0, pieces[0] - 1))
    noted = Noted(sdtp_pruner(0.6))
    cache = ComposedCache([noted], observe=(Survival(),))
    inputs = left_padded(prompt(2, length, seed), [0, padding])
    expected: list[dict[int, float]] = [{}, {}]
    for start, stop in pairwise([0, *torch.tensor(pieces).cumsum(0).tolist()]):
        noted.notes.clear()
        ids, mask = inputs["input_ids"][:, start:stop], inputs["attention_mask"][:, :stop]
        tiny_model()(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        left = [cache.columns(layer) for layer in range(LAYERS)]
        for row in range(2):
            judged = judgements(noted.notes, row)
            for tokens, _ in noted.notes:
                # Whoever entered the stage's layer survived it.
                entered = set(left[tokens.layer][row, 0].tolist())
                judged |= {c: n for c, n in judged.items() if c not in entered}
            last = {
                c: stage
                for stage, (t, _) in enumerate(noted.notes)
                for c in t.columns[row].tolist()
            }
            for column, number in judged.items():
                stage = last[column]
                layer = noted.notes[stage][0].layer
                stayed = column in left[layer][row, 0].tolist()
                expected[row][column] = number + stayed
    for layer in range(LAYERS):
        slots = cache.layers[layer]
        for row in range(2):
            numbers = slots.statistics[Survival()][row]
            for place, column in enumerate(slots.columns[row, 0].tolist()):
                if column >= 0:
                    number = expected[row].get(column, torch.inf)
                    assert numbers[:, place].tolist() == pytest.approx([number] * 2, abs=1e-12)


@dataclass(frozen=True, repr=False)
class BySurvival(OneBudget):
    """Keeps what came furthest, in all layers, once."""

    when: int | str | None = field(default="prompt", kw_only=True)

    statistics = (Survival(),)

    def rank_layers(self, layers: Sequence[SlotView]) -> list[Ranking | None]:
        """Layer by layer."""
        return [
            Ranking(
                view.statistic(Survival()), torch.zeros_like(view.valid), view.tokens(self.budget)
            )
            for view in layers
        ]


@torch.no_grad()
def test_saliency_evicts_after_the_last_layer(tmp_path):
    """The first layer keeps what only later stages judged; what is generated has come furthest."""
    model, ids = tiny_model(), prompt(1, 30)
    cache = ComposedCache([sdtp_pruner(0.6), BySurvival(7)])
    model(ids, past_key_values=cache, logits_to_keep=1)
    kept = [sorted(cache.columns(layer)[0, 0].tolist()) for layer in range(LAYERS)]
    assert kept == [kept[0]] * LAYERS and len(kept[0]) == 7
    watched = ComposedCache([sdtp_pruner(0.6), BySurvival(7)])
    with torch.enable_grad():
        model(ids, past_key_values=watched, logits_to_keep=1)
    assert torch.equal(watched.columns(0).sort().values, cache.columns(0).sort().values)
    dense = ComposedCache([sdtp_pruner(0.6)])
    model(ids, past_key_values=dense, logits_to_keep=1)
    assert set(kept[0]) <= set(dense.columns(LAYERS - 1)[0, 0].tolist())
    model(ids[:, :1], past_key_values=cache)
    number = cache.layers[0].statistics[Survival()][0, 0]
    assert [bool(n) for n in number.isinf()] == [c == 30 for c in cache.layers[0].columns[0, 0]]
    cache.save(tmp_path / "cache")
    loaded = ComposedCache.load(tmp_path / "cache", cache.policies, model)
    for part in (loaded, copy.deepcopy(cache)):
        assert torch.equal(part.layers[0].statistics[Survival()][0, 0], number)


@torch.no_grad()
def test_drafts_that_are_taken_back_leave_what_is_known():
    """Of a prompt that came in the same forward."""
    model, ids = tiny_model(), torch.cat([prompt(1, 8)] * 3, 1)
    held = []
    for drafts in (0, 3):
        cache = ComposedCache([sdtp_pruner(0.6), H2O(10, 10)], observe=(Survival(),))
        if drafts:
            cache.announce_prompt(24, 24)
            cache.activate_past_recording()
        model(torch.cat([ids, ids[:, :drafts]], 1), past_key_values=cache, logits_to_keep=1)
        cache.crop(-drafts)
        slots = cache.layers[0]
        order = slots.columns[0, 0].argsort()
        held.append((slots.columns[0, 0][order], slots.statistics[Survival()][0, :, order]))
    for one, other in zip(*held, strict=True):
        torch.testing.assert_close(one, other)


class Both(Noted):
    """A policy that prunes and evicts."""

    def __init__(self) -> None:
        super().__init__(sdtp_pruner(0.6))

    def rank_slots(self, slots: SlotView) -> None:
        """Keeps everything."""


def test_a_union_that_prunes_is_refused():
    """Its parts judge apart."""
    union = sdtp_pruner(0.8) | FastKV(0.5)
    for cache in (
        ComposedCache([union, BySurvival(5)]),
        ComposedCache([sdtp_pruner(0.6) | sdtp_pruner(0.7)], observe=(Survival(),)),
        ComposedCache([kvprune.Around(Both() | Both())], observe=(Survival(),)),
    ):
        with pytest.raises(KVPruneError, match=r"Survival\(\) beside .* judge hidden states apart"):
            tiny_model()(prompt(1, 20), past_key_values=cache)
        assert cache.seen == 0


class Says(nn.Module):
    """A number for each head, out of the mean of a token's state and the layer."""

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        """`[B, 2, Q]`."""
        mean = hidden.mean(-1)[:, None]
        return torch.cat([mean * (layer + 1), -mean], 1)


def entering(model: Any, ids: Tensor) -> list[Tensor]:
    """The gate's numbers in each layer for a dense reading of one row, `[2, n]`."""
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        for layer in model.model.layers
    ]
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [Says()(hidden, layer)[0] for layer, hidden in enumerate(found)]


@pytest.mark.parametrize("pipeline", ["dense", "h2o", "sdtp", "drafts"])
@pytest.mark.parametrize("edges", [(0, 20), (0, 7, 8, 20)])
@torch.no_grad()
def test_what_a_module_says_stays_with_its_slot(pipeline, edges):
    """Whatever goes, in chunks, beside padding and in decoding; said of what enters the layer."""
    model, inputs = tiny_model(), left_padded(prompt(2, 24), [0, 6])
    gate = Gate(Says())
    policies = {"h2o": [H2O(5, 5)], "sdtp": [sdtp_pruner(0.6)]}.get(pipeline, [])
    cache = ComposedCache(policies, observe=(gate,))
    for start, stop in [*pairwise(edges), (20, 21), (21, 24)]:
        if pipeline == "drafts" and start == 21:
            cache.activate_past_recording()
        ids, mask = inputs["input_ids"][:, start:stop], inputs["attention_mask"][:, :stop]
        model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    if pipeline == "drafts":
        cache.crop(-2)
    for row, padding in enumerate((0, 6)):
        says = entering(model, inputs["input_ids"][row : row + 1, padding:])
        for layer in range(LAYERS if pipeline in ("dense", "drafts") else 1):
            slots = cache.layers[layer]
            for head in range(2):
                columns = slots.columns[row, head % slots.columns.shape[1]].tolist()
                numbers = slots.statistics[gate][row, head].tolist()
                for column, number in zip(columns, numbers, strict=True):
                    if column >= 0:
                        expected = float(says[layer][head, column - padding])
                        assert number == pytest.approx(expected, rel=1e-9, abs=1e-12)


class Answers(nn.Module):
    """Answers what it was made for."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, hidden: Tensor, layer: int) -> Any:
        """The answer."""
        return self.answer(hidden[..., 0][:, None])


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda x: x[:, 0], r"expected floats of shape \[1, 1 or the key/value heads, 9\]"),
        (lambda x: x[..., :-1], r"for each token and head, got torch.float64 of shape \[1, 1, 8\]"),
        (lambda x: x > 0, "got torch.bool"),
        (lambda x: "high", "got str"),
        (lambda x: torch.cat([x] * 3, 1), r"the key/value heads, 9\], one .*, got .* \[1, 3, 9\]"),
        (lambda x: x * torch.nan, r"can be compared, got NaN in rows \[0\]"),
    ],
    ids=["no head axis", "too few", "bool", "str", "heads", "nan"],
)
def test_modules_that_do_not_answer(answer, match):
    """Named, with what was expected."""
    cache = ComposedCache([], observe=(Gate(Answers(answer)),))
    with pytest.raises(KVPruneError, match=r"Gate\(Answers, \w+\): .*" + match):
        tiny_model()(prompt(1, 9), past_key_values=cache)


def test_a_gate_that_is_no_module():
    """A function has no parameters to move and save."""
    nothing: Any = max
    with pytest.raises(KVPruneError, match=r"expected a torch.nn.Module"):
        Gate(nothing)
    with pytest.raises(KVPruneError, match=r"Gate: Linear.forward .*takes hidden states"):
        Gate(nn.Linear(3, 3))


class Scaled(nn.Module):
    """The mean of a state, times a weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        """`[B, 1, Q]`."""
        return (hidden.mean(-1) * self.weight)[:, None]


class ByGate(OneBudget):
    """Keeps the largest numbers of a gate."""

    def __init__(self, budget: int, gate: Gate) -> None:
        super().__init__(budget)
        object.__setattr__(self, "gate", gate)

    @property
    def statistics(self) -> tuple[Gate, ...]:
        """The gate."""
        return (self.__dict__["gate"],)

    def rank_slots(self, slots: SlotView) -> Ranking:
        """By its numbers."""
        score = slots.statistic(self.__dict__["gate"])
        return Ranking(score, torch.zeros_like(slots.valid), slots.tokens(self.budget))


@torch.no_grad()
def test_a_gate_in_copies_and_files(tmp_path):
    """A copy goes on with the very module; a file knows another module from this one."""
    model, ids, gates = tiny_model(), prompt(1, 30), [Gate(Scaled(w)) for w in (1.0, -1.0)]
    cache = ComposedCache([ByGate(9, gates[0])], observe=(gates[1],))
    model(ids, past_key_values=cache, logits_to_keep=1)
    cache.save(tmp_path / "cache")
    policies = [ByGate(9, gates[1]), ByGate(8, gates[0])]
    loaded = ComposedCache.load(tmp_path / "cache", policies, model)
    for part in gates:
        held = [c.layers[0].statistics[part] for c in (cache, loaded)]
        assert torch.equal(*held)
    twin = copy.deepcopy(cache)
    for each in (cache, twin):
        model(ids[:, :1], past_key_values=each)
    assert torch.equal(cache.columns(0), twin.columns(0))
    with pytest.raises(KVPruneError, match="which observed"):
        ComposedCache.load(tmp_path / "cache", [ByGate(9, Gate(Scaled(2.0)))], model)
    alike = ComposedCache([], observe=(Gate(Says()), Gate(Says())))
    model(ids, past_key_values=alike, logits_to_keep=1)
    with pytest.raises(KVPruneError, match="that a file can tell apart"):
        alike.save(tmp_path / "alike")


@torch.no_grad()
def test_a_row_that_is_not_finite_does_not_end_the_batch():
    """The gate says nothing of it; the other row keeps what it keeps alone."""
    model: Any = tiny_model()
    embeds = model.get_input_embeddings()(prompt(2, 20)).clone()
    alone = ComposedCache([ByGate(9, Gate(Scaled(1.0)))])
    model(inputs_embeds=embeds[1:], past_key_values=alone, logits_to_keep=1)
    embeds[0, 5] = torch.nan
    cache = ComposedCache([ByGate(9, Gate(Scaled(1.0)))])
    model(inputs_embeds=embeds, past_key_values=cache, logits_to_keep=1)
    for layer in range(LAYERS):
        assert torch.equal(
            cache.columns(layer)[1:].sort().values, alone.columns(layer).sort().values
        )


@dataclass(frozen=True)
class Times(Statistic):
    """How often a token was shown; once, if all is right."""

    reads = "hidden"
    checked = False

    def numbers(self, hidden: Tensor, layer: int) -> Tensor:
        """One for each."""
        return torch.ones_like(hidden[..., 0])[:, None]

    def join(self, held: Tensor, new: Tensor) -> Tensor:
        """Adds up."""
        return held + new.nan_to_num(0)


@torch.no_grad()
def test_every_token_is_shown_once():
    """Drafts as well, whether they are taken back or not."""
    cache = ComposedCache([H2O(12, 12)], observe=(Times(),))
    tiny_model()(prompt(1, 20), past_key_values=cache, logits_to_keep=1)
    cache.activate_past_recording()
    tiny_model()(prompt(1, 4), past_key_values=cache)
    cache.crop(-2)
    tiny_model()(prompt(1, 3), past_key_values=cache)
    for layer in cache.layers:
        times = layer.statistics[Times()]
        assert bool((times == 1)[(layer.columns >= 0).expand_as(times)].all())
