"""Statistics of other packages: observed, moved with their slots, saved, and held to their form."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch

import kvprune
from kvprune import KVPruneError, Ranking
from kvprune.statistics import Attention, Statistic

from ..support.models import LAYERS, left_padded, plain_model, prompt, tiny_model


@dataclass(frozen=True)
class Hits(Statistic):
    """The number of queries that gave a slot at least so much, all heads of its group together."""

    least: float = 0.1
    reads: ClassVar[str] = "probabilities"

    def join(self, held, new):
        """Counts those of a block."""
        return held + (new.probabilities >= self.least).sum((2, 3))


@dataclass(frozen=True)
class MeanQuery(Statistic):
    """The mean of a row's queries in this prompt, `[B, Hq, D]`, and their number `[B]`."""

    per: ClassVar[str] = "layer"
    reads: ClassVar[str] = "queries"

    def join(self, held, new):
        """Adds up, padding left out."""
        queries, columns = new
        there = columns >= 0
        total = (queries * there[:, None, :, None]).sum(2)
        count = there.sum(-1)
        return (total + held[0], count + held[1]) if held else (total, count)

    def value(self, *held):
        """The mean."""
        ((total, count),) = held
        return total / count[:, None, None]


class ByHits(kvprune.TokenPolicy):
    """Keeps what was looked at often; ties go to the newer slot."""

    statistics = (Hits(),)

    def rank_slots(self, slots):
        """At most eight slots."""
        score = slots.statistic(Hits())
        budget = torch.full((score.shape[0],), 8)
        return Ranking(score, torch.zeros_like(score, dtype=torch.bool), budget)


class AlongTheMean(kvprune.TokenPolicy):
    """Keeps keys that the mean query likes."""

    statistics = (MeanQuery(),)

    def __init__(self, when: Any = "prompt") -> None:
        super().__init__(when=when)
        self.seen: list[torch.Tensor] = []

    def rank_slots(self, slots):
        """Six slots, by the first query head of each group."""
        mean = slots.statistic(MeanQuery())
        self.seen.append(mean)
        heads = slots.keys.shape[1]
        score = (slots.keys * mean.unflatten(1, (heads, -1))[:, :, :1]).sum(-1)
        budget = torch.full((score.shape[0],), 6)
        return Ranking(score, torch.zeros_like(score, dtype=torch.bool), budget)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt_neox"])
@pytest.mark.parametrize("edges", [(0, 20), (0, 7, 8, 13, 20)])
def test_a_number_per_slot_is_what_eager_attention_says(family, edges):
    """In one forward and in chunks, beside a row with padding."""
    inputs = left_padded(prompt(2, 20), [0, 6])
    cache = kvprune.ComposedCache([], observe=(Hits(0.08),))
    for start, stop in pairwise(edges):
        ids = inputs["input_ids"][:, start:stop]
        mask = inputs["attention_mask"][:, :stop]
        tiny_model(family)(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    model: Any = copy.deepcopy(plain_model(family))
    model.set_attn_implementation("eager")
    for row, padding in enumerate((0, 6)):
        alone = inputs["input_ids"][row : row + 1, padding:]
        given = model(alone, output_attentions=True).attentions
        for layer, probabilities in zip(cache.layers, given, strict=True):
            hits = (probabilities[0] >= 0.08).sum(1).unflatten(0, (layer.keys.shape[1], -1)).sum(1)
            numbers, columns = layer.statistics[Hits(0.08)][row], layer.columns[row, 0]
            for number, column in zip(numbers.T, columns.tolist(), strict=True):
                # A window has dropped what no query sees any more.
                if column >= 0:
                    assert number.tolist() == hits[:, column - padding].tolist()


@torch.no_grad()
def test_it_stays_with_its_slots_through_all_that_befalls_a_cache(tmp_path):
    """Beams, copies, files and crops: the same slots are kept as by a cache left alone."""
    model, ids = tiny_model(), prompt(2, 40)

    def go_on(cache: Any) -> list[list[int]]:
        model(ids[:, 30:], past_key_values=cache, logits_to_keep=1)
        return [cache.columns(layer).tolist() for layer in range(LAYERS)]

    def read() -> Any:
        cache = kvprune.ComposedCache([ByHits()])
        model(ids[:, :20], past_key_values=cache, logits_to_keep=1)
        for at in range(20, 30):
            model(ids[:, at : at + 1], past_key_values=cache)
        return cache

    expected, cache = go_on(read()), read()
    cache.save(tmp_path / "cache")
    loaded = kvprune.ComposedCache.load(tmp_path / "cache", [ByHits()], model)
    swapped = read()
    for _ in range(2):
        swapped.reorder_cache(torch.tensor([1, 0]))
    assert go_on(copy.deepcopy(cache)) == go_on(loaded) == go_on(swapped) == expected


@pytest.mark.parametrize("edges", [(0, 20), (0, 7, 8, 13, 20)])
def test_what_is_of_a_layer_begins_anew_with_each_prompt(edges):
    """The mean over the queries of one prompt, however it is cut; then it is freed."""
    inputs, policy = left_padded(prompt(2, 20), [0, 6]), AlongTheMean()
    cache = kvprune.ComposedCache([policy])
    everything = kvprune.ComposedCache([], observe=(MeanQuery(),))
    model: Any = tiny_model()
    with cache.prompt([20, 14]):
        for start, stop in pairwise(edges):
            ids = inputs["input_ids"][:, start:stop]
            mask = inputs["attention_mask"][:, :stop]
            model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    assert len(policy.seen) == LAYERS and not any(each.records for each in cache.layers)
    model(**inputs, past_key_values=everything, logits_to_keep=1)
    for layer, mean in zip(everything.layers, policy.seen, strict=True):
        torch.testing.assert_close(mean, MeanQuery().value(layer.records[MeanQuery()]))
    first = policy.seen.copy()
    ones = torch.ones(2, 25, dtype=torch.long)
    ones[1, :6] = 0
    model(prompt(2, 5, 1), attention_mask=ones, past_key_values=cache, logits_to_keep=1)
    assert len(policy.seen) == 2 * LAYERS
    assert not torch.allclose(policy.seen[LAYERS], first[0])


@dataclass(frozen=True)
class Together(Statistic):
    """Made of another."""

    per: ClassVar[str] = "layer"
    reads: ClassVar[str] = "queries"

    @property
    def parts(self) -> tuple[Statistic, ...]:
        """What is held for it."""
        return (MeanQuery(),)


def test_what_others_are_made_of_is_observed():
    cache = kvprune.ComposedCache([], observe=(Together(),))
    tiny_model()(**left_padded(prompt(2, 20), [0, 6]), past_key_values=cache, logits_to_keep=1)
    assert all(MeanQuery() in layer.records for layer in cache.layers)


@dataclass(frozen=True)
class Bad(Statistic):
    """Returns what is said."""

    kind: str = "shape"
    per: ClassVar[str] = "slot"

    def join(self, held, new):
        """Nonsense."""
        made: dict[str, Any] = {
            "shape": held[..., :1],
            "dtype": held.half(),
            "nan": held * torch.nan,
            "text": "held",
        }
        return made[self.kind]


@dataclass(frozen=True)
class BadOfLayer(Statistic):
    """Returns what has no rows."""

    per: ClassVar[str] = "layer"
    reads: ClassVar[str] = "queries"

    def join(self, held, new):
        """One number."""
        return (new[0].sum(),)


MADE_BADLY = {
    Bad("shape"): r"expected join\(\) to return torch.float64 of shape \[1, 2, 9\].*\[1, 2, 1\]",
    Bad("dtype"): r"expected join\(\) to return torch.float64 .* got torch.float16",
    Bad("nan"): r"expected join\(\) to return numbers that can be compared, got NaN in rows \[0\]",
    Bad("text"): r"expected join\(\) to return torch.float64 .* got str",
    BadOfLayer(): r"expected join\(\) to return a tuple of tensors whose first axis are the 1 rows",
}


@pytest.mark.parametrize("bad", MADE_BADLY, ids=repr)
def test_what_a_statistic_returns_is_checked(bad):
    """With its name, what was expected and what came."""
    cache = kvprune.ComposedCache([], observe=(bad,))
    with pytest.raises(KVPruneError, match=MADE_BADLY[bad]) as error:
        tiny_model()(prompt(1, 9), past_key_values=cache)
    assert str(error.value).startswith(repr(bad))


@dataclass(frozen=True)
class NoJoin(Statistic):
    """Says nothing."""


@dataclass(frozen=True)
class OfTokens(Statistic):
    """Reads what there is not."""

    reads: ClassVar[str] = "hidden states"

    def join(self, held, new):
        """Never called."""
        return held


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ((NoJoin(),), r"expected a statistic with a method join\(held, new\)"),
        ((OfTokens(),), "reads='hidden states': expected"),
        (Attention(), "expected a tuple of objects out of kvprune.statistics"),
        (("attention",), "expected a tuple of objects out of kvprune.statistics"),
        ((Hits,), "expected a tuple of objects out of kvprune.statistics"),
    ],
)
def test_what_cannot_be_observed_is_refused(wanted, match):
    """By a cache that is to observe it, and in a policy that names it."""

    class Wants(ByHits):
        """Names it."""

        statistics = wanted

    for make in (
        lambda: kvprune.ComposedCache([], observe=wanted),
        lambda: kvprune.ComposedCache([Wants()]),
    ):
        with pytest.raises(KVPruneError, match=match):
            make()
