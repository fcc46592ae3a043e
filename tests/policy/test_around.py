"""Around: a policy that is handed another one's ranking."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune import Around, KVPruneError, Ranking
from kvprune.evaluation.specs import canonical, parse
from kvprune.policies import H2O, SDTP, TOVA, FastKV, KeyDiff, Knorm, SnapKV, StreamingLLM
from kvprune.statistics import Attention, Queries
from kvprune.testing.runs import feed

from ..support.models import prompt, tiny_model
from ..support.strategies import EVICTING, cases, evicting


@dataclass(frozen=True, repr=False)
class KeepsSinks(Around):
    """The base's choice, and a row's first tokens besides."""

    sinks: int = 2
    constant_budget = False

    def rerank(self, slots, ranking):
        """Protects them; the budget grows by as many."""
        sinks = slots.oldest(self.sinks).expand_as(ranking.protected)
        budget = ranking.budget + self.sinks
        return Ranking(ranking.score, ranking.protected | sinks, budget)


@dataclass(frozen=True, repr=False)
class BySmallValues(Around):
    """A base's budget, spent on the slots with the smallest values."""

    layers_alike = False

    @property
    def statistics(self):
        """The base's, and one of its own."""
        return (*super().statistics, Attention("max"))

    def rerank(self, slots, ranking):
        """Divides by what the values add up to."""
        most = slots.statistic(Attention("max"))
        return replace(ranking, score=most - slots.values.norm(dim=-1))


@given(evicting, st.integers(2, 10), cases(st.just("llama")))
def test_with_nothing_to_say_it_equals_its_base(listed, budget, case):
    """In chunks, padding, decoding and a second turn: the same columns and logits."""
    base = listed.make(budget)
    runs = [case.run([policy]) for policy in (base, Around(base))]
    logits = [feed(run, case.ids, case.mask, case.steps) for run in runs]
    assert runs[0].kept() == runs[1].kept()
    for mine, other in zip(*logits, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("listed", EVICTING, ids=repr)
def test_it_hands_on_all_that_its_base_says(listed):
    """Promises, hooks, statistics, times, layers and budgets."""
    base = listed.make(8)
    around = Around(base)
    names = ["hooks", "statistics", "when", "layers", "fixed_budget", "shares_heads"]
    names += ["constant_budget", "layers_alike", "sinks_before_window"]
    for name in names:
        assert getattr(around, name) == getattr(base, name), name
    smaller = base.with_budget(0.5)
    assert around.with_budget(0.5) == (None if smaller is None else Around(smaller))
    assert parse(canonical([around])) == [around]


def test_what_a_subclass_says_comes_before_what_the_base_says():
    """Promises that its rerank does not keep, also where the base is replaced."""
    policy = KeepsSinks(TOVA(4))
    assert TOVA.constant_budget and not policy.constant_budget and policy.layers_alike
    assert not replace(policy, base=TOVA(5)).constant_budget
    assert not BySmallValues(TOVA(4)).layers_alike
    assert Around(H2O(2, 2, positions="cache")).positions_in_cache
    assert Around(H2O(2, 2, positions="cache") | H2O(2, 2)).positions_in_cache


def test_the_base_keeps_its_layers_its_time_and_its_model():
    """Asked only there and then; what `for_model` makes of the base is used."""
    ids, base = prompt(1, 30), Knorm(6, layers=[1])
    cache = kvprune.ComposedCache([KeepsSinks(base)])
    model: Any = tiny_model()
    model(ids, past_key_values=cache, logits_to_keep=1)
    assert [cache.columns(i).shape[-1] for i in range(3)] == [30, 8, 30]
    for head in cache.columns(1)[0].tolist():
        assert {0, 1} <= set(head)
    model(ids[:, :1], past_key_values=cache)
    assert cache.columns(1).shape[-1] == 9
    with pytest.raises(KVPruneError, match="window=5000: expected at most the model's context"):
        model(ids, past_key_values=kvprune.ComposedCache([Around(SnapKV(0.5, window=5000))]))


def test_it_sees_what_it_names_and_the_base_only_its_own():
    """Statistics of both; keys where the base had promised to read none."""
    ids, asked = prompt(1, 30), []

    class Looks(TOVA):
        """TOVA that looks beyond what it named."""

        def rank_slots(self, slots):
            """Notes the error."""
            with pytest.raises(KVPruneError, match="was not observed here"):
                slots.statistic(Attention("max"))
            asked.append(slots.layer)
            return super().rank_slots(slots)

    cache = kvprune.ComposedCache([BySmallValues(Looks(5))])
    model: Any = tiny_model()
    model(ids, past_key_values=cache, logits_to_keep=1)
    model(ids[:, :1], past_key_values=cache)
    assert cache.columns(0).shape[-1] == 5 and len(asked) == 8


def test_a_base_that_answers_nonsense_is_named():
    """Before `rerank` is handed it."""

    class Wrong(kvprune.TokenPolicy):
        """Answers with a score of two numbers."""

        def rank_slots(self, slots):
            """Of the wrong shape."""
            rows = slots.valid.shape[0]
            score = torch.zeros(rows, 1, 2)
            return Ranking(score, score.bool(), torch.full((rows,), 3))

        def __repr__(self) -> str:
            return "Wrong()"

    cache = kvprune.ComposedCache([KeepsSinks(Wrong())])
    with pytest.raises(KVPruneError, match=r"^Wrong\(\): expected score"):
        tiny_model()(prompt(1, 9), past_key_values=cache)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Around(FastKV()), "expected a policy that ranks slots"),
        (lambda: Around(SDTP()), "expected a policy that ranks slots"),
        (lambda: Around(cast("Any", "h2o")), "expected a policy that ranks slots"),
    ],
)
def test_bad_arguments_are_refused(make, match):
    """With what was expected and what came."""
    with pytest.raises(KVPruneError, match=f"^Around: .*{match}"):
        make()


def test_specs_nest():
    """Any depth, unions within, classes of other modules; what is no policy is refused."""
    here = f"{__name__}:KeepsSinks"
    for text, expected in {
        f"{here}(base=snapkv(0.25), sinks=3)": KeepsSinks(SnapKV(0.25), 3),
        f"{here}(knorm)": KeepsSinks(Knorm()),
        f"{here}(h2o(4, 4) | streaming(2, 4))": KeepsSinks(H2O(4, 4) | StreamingLLM(2, 4)),
        f"{here}({here}(keydiff(0.5)))": KeepsSinks(KeepsSinks(KeyDiff(0.5))),
    }.items():
        (policy,) = parse(text)
        assert policy == expected and parse(canonical([policy])) == [policy]
        assert parse(f"{text} + h2o")[1:] == [H2O()]
    for text, match in {
        f"{here}(base=knorn)": "expected a number, a text in quotes, None, a list or a policy",
        f"{here}(base=fastkv)": "expected a policy that ranks slots",
        f"{here}(base=knorm(bugdet=2))": "has no argument 'bugdet'",
        f"{here}(base=knorm+h2o)": "expected the name of a policy",
    }.items():
        with pytest.raises(KVPruneError, match=match):
            parse(text)


def test_queries_of_the_base_are_held_and_freed():
    """As for the base alone."""
    model, cache = tiny_model(), kvprune.ComposedCache([Around(SnapKV(8, window=3))])
    model(prompt(1, 30), past_key_values=cache, logits_to_keep=1)
    assert cache.columns(0).shape[-1] == 8
    assert Queries(3) in cache.layers[0].layer_parts and not cache.layers[0].records


class Ordinary(Around):
    """No dataclass: an argument of its own, which a cache must not lose."""

    def __init__(self, base: kvprune.TokenPolicy, more: int = 0) -> None:
        super().__init__(base)
        object.__setattr__(self, "more", more)

    def rerank(self, slots, ranking):
        """So many slots more."""
        return replace(ranking, budget=ranking.budget + vars(self)["more"])


def test_an_ordinary_class_keeps_its_arguments():
    """Also where the base becomes another one on a model, or has another budget."""
    cache = kvprune.ComposedCache([Ordinary(FastAndSlow(5), more=3)])
    tiny_model()(prompt(1, 30), past_key_values=cache, logits_to_keep=1)
    assert cache.columns(0).shape[-1] == 8
    smaller: Any = Ordinary(TOVA(0.5), 3).with_budget(0.25)
    assert smaller.more == 3 and smaller.base == TOVA(0.25)


class FastAndSlow(Knorm):
    """Knorm that is another object on a model."""

    def for_model(self, model):
        """A copy."""
        return replace(self)


def test_another_base_brings_its_own_layers_and_time():
    """As `replace` says it."""
    policy = replace(KeepsSinks(SnapKV(0.25)), base=TOVA(4, layers=[1]))
    assert policy.when is None and policy.layers == [1] and policy.statistics == TOVA.statistics


def test_promises_about_what_is_kept_go_with_an_own_answer():
    """Positions inside the cache would be wrong, with sinks that the base knows nothing of."""
    inside = StreamingLLM(1, 7, positions="cache")
    policy = KeepsSinks(inside, 4)
    assert inside.sinks_before_window == 1 and policy.sinks_before_window is None
    assert policy.positions_in_cache and not policy.constant_budget
    assert Around(inside).sinks_before_window == 1 and Around(inside).constant_budget


@pytest.mark.parametrize(
    "policy",
    [
        KeepsSinks(StreamingLLM(1, 7, positions="cache")),
        Around(TOVA(6, layers=[0])),
        Around(Around(H2O(2, 4))),
    ],
    ids=repr,
)
def test_it_passes_the_tests_for_authors(policy):
    """All invariants."""
    kvprune.testing.check(policy, examples=1)


@dataclass(frozen=True, repr=False)
class Two(Around):
    """Two policies within, and a text that looks like one."""

    other: kvprune.TokenPolicy | None = None
    note: str = ""


def test_specs_of_several_policies_within():
    """Each is written once, and texts stay as they are; other arguments take no policies."""
    one = KeepsSinks(TOVA(4))
    for policy in (Two(one, one), Two(one, KeepsSinks(one)), Two(one, note=repr(one))):
        assert parse(canonical([policy])) == [policy]
    for text in ("tova(layers=h2o)", "tova(when=h2o(2, 2))"):
        with pytest.raises(KVPruneError, match="to be a plain value, got the policy H2O"):
            parse(text)
