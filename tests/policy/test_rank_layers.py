"""Policies that see all layers at once, after the last one."""

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
from torch import Tensor

import kvprune
from kvprune import ComposedCache, KVPruneError, Ranking
from kvprune.policies import H2O, TOVA, Knorm, StreamingLLM
from kvprune.policy import OneBudget, SlotView
from kvprune.statistics import Attention, Queries

from ..support.family_models import attached_family
from ..support.models import LAYERS, left_padded, plain_model, prompt, tiny_model
from ..support.strategies import chunked, seeds


@dataclass(frozen=True, repr=False)
class OneForAll(OneBudget):
    """The budget times the layers and heads, shared out by accumulated attention; sinks stay."""

    when: int | str | None = field(default="prompt", kw_only=True)

    statistics = (Attention(),)

    def rank_layers(self, layers: Sequence[SlotView]) -> list[Ranking | None]:
        """Counts for each head which of its slots are among the best of all."""
        scores = [view.statistic(Attention()).masked_fill(~view.valid, -1) for view in layers]
        every = torch.cat([score.flatten(1) for score in scores], 1)
        found: list[Ranking | None] = []
        for view, score in zip(layers, scores, strict=True):
            count = view.tokens(self.budget) * len(layers) * score.shape[1]
            best = [
                row.sort(descending=True).values[min(int(n), len(row)) - 1]
                for row, n in zip(every, count, strict=True)
            ]
            chosen = (score >= torch.stack(best)[:, None, None]) & (score >= 0)
            found.append(Ranking.only(chosen | view.oldest(1)))
        return found


@dataclass(frozen=True, repr=False)
class Each(OneBudget):
    """Knorm, but asked about all layers at once."""

    when: int | str | None = field(default="prompt", kw_only=True)

    def rank_layers(self, layers: Sequence[SlotView]) -> list[Ranking | None]:
        """The answers of Knorm."""
        return [Knorm(self.budget).rank_slots(view) for view in layers]


class ByLooks(OneBudget):
    """The largest looks of the newest two queries, asked for after the last layer."""

    statistics = (Queries(2),)

    def rank_layers(self, layers: Sequence[SlotView]) -> list[Ranking | None]:
        """Layer by layer."""
        return [largest(view, self.budget) for view in layers]


class ByLooksEach(OneBudget):
    """The same, asked layer by layer."""

    statistics = (Queries(2),)

    def rank_slots(self, slots: SlotView) -> Ranking:
        """By the sum over queries and heads."""
        return largest(slots, self.budget)


def largest(slots: SlotView, budget: int | float) -> Ranking:
    """Ranks by the sum of looks over queries and heads."""
    score = slots.looks(2).sum((2, 3))
    return Ranking(score, torch.zeros_like(slots.valid), slots.tokens(budget))


def kept(cache: Any) -> list[Any]:
    """What each layer holds."""
    return [cache.columns(layer).tolist() for layer in range(LAYERS)]


@torch.no_grad()
def read(cache: Any, edges: Sequence[int], padding: int = 0, seed: int = 0) -> Any:
    """Two rows, one with padding, in pieces."""
    inputs = left_padded(prompt(2, edges[-1], seed), [0, padding])
    with cache.prompt([edges[-1], edges[-1] - padding]):
        for start, stop in pairwise(edges):
            ids, mask = inputs["input_ids"][:, start:stop], inputs["attention_mask"][:, :stop]
            tiny_model()(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    return cache


@given(st.integers(4, 30), st.integers(1, 9), st.data(), seeds)
def test_one_budget_for_all_layers_is_the_oracle_s(length, budget, data, seed):
    """The best of all layers and heads, by attention that eager models return; in chunks too."""
    pieces = data.draw(chunked(length))
    padding = data.draw(st.integers(0, min(pieces[0], length - 2) - 1))
    edges = [0, *torch.tensor(pieces).cumsum(0).tolist()]
    cache = read(ComposedCache([OneForAll(budget)]), edges, padding, seed)
    model: Any = copy.deepcopy(plain_model())
    model.set_attn_implementation("eager")
    ids = prompt(2, length, seed)
    for row, pad in enumerate((0, padding)):
        inputs = left_padded(ids, [0, padding])["input_ids"][row : row + 1, pad:]
        given = model(inputs, output_attentions=True).attentions
        scores = {
            (layer, head, column): float(probabilities[0].sum(1).unflatten(0, (2, -1)).sum(1)[h, c])
            for layer, probabilities in enumerate(given)
            for h, head in enumerate(range(2))
            for c, column in enumerate(range(pad, length))
        }
        best = sorted(scores, key=lambda slot: -scores[slot])[: budget * LAYERS * 2]
        for layer in range(LAYERS):
            columns = cache.columns(layer)[row]
            for head in range(2):
                mine = columns[head if len(columns) > 1 else 0].tolist()
                wanted = {c for at, h, c in best if (at, h) == (layer, head)} | {pad}
                assert {c for c in mine if c >= 0} == wanted


@pytest.mark.parametrize(
    "around",
    [lambda p: [p], lambda p: [H2O(8, 8), p, TOVA(6)], lambda p: [StreamingLLM(2, 14), p]],
    ids=["alone", "between", "behind"],
)
@pytest.mark.parametrize("pair", [(Each, Knorm), (ByLooks, ByLooksEach)], ids=["keys", "looks"])
@pytest.mark.parametrize("when", [None, "prompt", 3])
def test_asked_together_as_asked_one_by_one(pair, when, around):
    """The same slots stay, whatever stands before and behind it in the pipeline."""
    caches = [read(ComposedCache(around(kind(10, when=when))), [0, 5, 24], 3) for kind in pair]
    for step in range(8):
        for cache in caches:
            with torch.no_grad():
                tiny_model()(prompt(2, 1, step), past_key_values=cache)
        assert kept(caches[0]) == kept(caches[1])


def test_policies_behind_it_see_what_it_left():
    """And those before it are asked first."""
    seen: list[tuple[str, int]] = []

    class Note(kvprune.TokenPolicy):
        def __init__(self, name: str) -> None:
            self.name = name
            super().__init__()

        def rank_slots(self, slots: SlotView) -> None:
            """Notes how many slots there are."""
            seen.append((self.name, int(slots.valid.sum(-1).amax())))

    read(ComposedCache([Note("before"), Each(7, when="prompt"), Note("behind")]), [0, 20])
    assert seen == [("before", 20)] * LAYERS + [("behind", 7)] * LAYERS


@pytest.mark.parametrize("family", ["mistral-window", "gemma2", "gpt2", "deepseek_v3", "bloom"])
def test_other_families(family):
    """Layers of all kinds: windows that drop what is out of sight, latent keys, own attention."""
    model: Any = attached_family(family)
    ids, said = prompt(2, 14), []
    for kind in (Each, Knorm):
        cache = ComposedCache([kind(6, when=None)])
        options: dict[str, Any] = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
        said.append(model.generate(ids, cache=cache, **options))
    assert torch.equal(*said)


def test_unions_and_wrappers():
    """A union keeps what either keeps; a wrapper reranks each layer."""

    class Fewer(kvprune.Around):
        def rerank(self, slots: SlotView, ranking: Ranking) -> Ranking:
            """Leaves one less."""
            return Ranking(ranking.score, ranking.protected, ranking.budget - 1)

    alone = [kept(read(ComposedCache([p]), [0, 20])) for p in (Each(6), ByLooks(5, when="prompt"))]
    union = kept(read(ComposedCache([Each(6) | ByLooks(5, when="prompt")]), [0, 20]))
    for layer in range(LAYERS):
        for row in range(2):
            for head in range(2):
                both = set(alone[0][layer][row][head]) | set(alone[1][layer][row][head])
                assert {c for c in union[layer][row][head] if c >= 0} == both
    wrapped = ComposedCache([Fewer(Each(6))])
    assert kept(read(wrapped, [0, 20])) == kept(read(ComposedCache([Knorm(5)]), [0, 20]))
    assert kept(read(ComposedCache([kvprune.Around(Each(6))]), [0, 20])) == alone[0]


def test_layers_that_it_does_not_apply_to():
    """These are not shown, and keep all; policies behind it are asked about them too."""
    cache = read(ComposedCache([Each(6, layers=[1, 3]), TOVA(9, layers=[0, 1])]), [0, 20])
    assert [cache.columns(layer).shape[-1] for layer in range(LAYERS)] == [9, 6, 20, 6]


@torch.no_grad()
def test_drafts_are_refused_by_name_and_before_anything_changes():
    """In assisted decoding, where it would be asked; a prompt that was read before is none."""
    model, ids = tiny_model(), torch.cat([prompt(1, 7)] * 2, 1)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    cache = ComposedCache([Each(6)])
    with pytest.raises(KVPruneError, match=r"Each\(.*all layers at once.*Leave out assistant_mod"):
        model.generate(ids, cache=cache, prompt_lookup_num_tokens=3, **options)
    assert cache.seen == 0
    said = model.generate(ids, cache=cache, **options)
    assert said.shape == (1, 19)
    always, at_the_end = ComposedCache([Each(6, when=None)]), ComposedCache([Each(6)])
    for cache in (always, at_the_end):
        model(ids[:, :9], past_key_values=cache, logits_to_keep=1)
        cache.activate_past_recording()
    with pytest.raises(KVPruneError, match="all layers at once"):
        model(ids[:, 9:], past_key_values=always)
    assert always.seen == 9
    model(ids[:, 9:], past_key_values=at_the_end)
    at_the_end.crop(-4)
    assert at_the_end.seen == 10


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda found: found[:-1], "expected a ranking, or None, for each of the 4 layers.*3 of"),
        (lambda found: iter(found), "for each of the 4 layers"),
        (lambda found: [*found[:-1], "all"], "expected"),
        (lambda found: [Ranking(f.score * torch.nan, f.protected, f.budget) for f in found], "NaN"),
    ],
    ids=["too few", "no sequence", "no ranking", "nan"],
)
def test_wrong_answers(answer, match):
    """Refused; the cache says afterwards that a forward failed."""

    class Wrong(Each):
        def rank_layers(self, layers: Sequence[SlotView]) -> Any:
            """Answers what it was made for."""
            return answer(super().rank_layers(layers))

    cache = ComposedCache([Wrong(6)])
    with pytest.raises(KVPruneError, match=match):
        read(cache, [0, 20])
    with pytest.raises(KVPruneError, match="reset"):
        read(cache, [0, 20])
    cache.reset()
    assert cache.seen == 0


def test_views_are_read_only():
    """What is written into one of them is named with its layer."""

    class Writes(Each):
        def rank_layers(self, layers: Sequence[SlotView]) -> Any:
            """Writes into the third layer."""
            values: Tensor = layers[2].values
            values[..., 0] = 0

    with pytest.raises(KVPruneError, match=r"wrote into its view at layer 2.*values"):
        read(ComposedCache([Writes(6)]), [0, 20])


def test_a_policy_ranks_slots_in_one_way():
    """Layer by layer, or all at once."""

    class Both(Knorm):
        def rank_layers(self, layers: Sequence[SlotView]) -> None:
            """Says nothing."""

    with pytest.raises(KVPruneError, match="ranks slots twice: expected a policy with rank_slots"):
        ComposedCache([Both(6)])


@torch.no_grad()
def test_other_policies_for_a_cache_that_was_read():
    """`with_policies`, as `compare` uses it, asks all layers at once too, and those behind."""
    model, ids = tiny_model(), prompt(1, 30)
    read_once = ComposedCache([])
    model(ids, past_key_values=read_once, logits_to_keep=1)
    for policies, twin in (
        ([Each(8)], [Knorm(8)]),
        ([StreamingLLM(4, 16), Each(8), Knorm(5)], [StreamingLLM(4, 16), Knorm(8), Knorm(5)]),
    ):
        found = [kept(read_once.with_policies(each, model)) for each in (policies, twin)]
        assert found[0] == found[1]
    assert read_once.columns(0).shape[-1] == 30


def test_a_budget_that_is_not_reached_drops_nothing():
    """And no buffer is made anew."""
    cache = read(ComposedCache([Each(99)]), [0, 20])
    assert all(layer.whole and layer.columns.shape[-1] == 20 for layer in cache.layers)
