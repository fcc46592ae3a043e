"""Caches and policies of a wrong type, and policies that are wrong themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from kvprune import Around, ComposedCache, KVPruneError, Ranking, TokenPolicy
from kvprune.policies import H2O, StreamingLLM
from kvprune.statistics import Attention

from ..support.models import (
    LAYERS,
    prompt,
    tiny_model,
)
from .checks import (
    LENGTH,
    NAN,
    assert_refused,
    assert_same_future,
    assert_unusable,
    filled,
    h2o,
    held,
    pruner,
)

# Caches and policies of a wrong type.


@pytest.mark.parametrize(
    "policies",
    [
        h2o(),
        H2O,
        [H2O],
        None,
        [None],
        "h2o",
        "",
        ["h2o"],
        {},
        {h2o()},
        3,
        [h2o(), 3],
        [[h2o()]],
        [h2o(), None],
    ],
    ids=repr,
)
def test_cache_of_no_list_of_policies(policies):
    """The error shows what a list of policies looks like."""
    with pytest.raises(KVPruneError, match=r"expected a list of policies, as ComposedCache\(\["):
        ComposedCache(policies)


def test_cache_handed_in_twice(cache):
    """Also where it is the same one."""
    model, ids = tiny_model(), prompt(1, 2 * LENGTH)
    other = tf.DynamicCache(config=model.config)
    assert_refused(
        cache,
        "cache= and past_key_values= were both given: expected one cache",
        lambda: model.generate(ids, cache=cache, past_key_values=other, max_new_tokens=2),
        lambda: model.generate(ids, cache=cache, past_key_values=cache, max_new_tokens=2),
        lambda: model.generate(ids, cache=other, past_key_values=cache, max_new_tokens=2),
    )


@pytest.mark.parametrize("wrong", ["h2o", 3, [h2o()], h2o(), ComposedCache])
def test_cache_argument_of_a_wrong_type(model, wrong):
    """`cache=` takes a ComposedCache, or another cache of transformers."""
    got = type(wrong).__name__
    with pytest.raises(KVPruneError, match=rf"cache= expects a ComposedCache .* got {got}$"):
        model.generate(prompt(1, LENGTH), cache=wrong, max_new_tokens=2)


def test_cache_switched_off(cache):
    """`use_cache=False` by keyword, by configuration and in a forward."""
    model, ids = tiny_model(), prompt(1, 2 * LENGTH)
    off = tf.GenerationConfig(use_cache=False, max_new_tokens=2)
    assert_refused(
        cache,
        "use_cache=False with a ComposedCache: leave out one",
        lambda: model.generate(ids, cache=cache, use_cache=False, max_new_tokens=2),
        lambda: model.generate(ids, cache=cache, generation_config=off),
        lambda: model(ids, past_key_values=cache, use_cache=False),
    )


@pytest.mark.parametrize("wrong", [3, None, "h2o", H2O, tf.DynamicCache()])
def test_union_with_something_else(wrong):
    """`a | b` takes two policies."""
    with pytest.raises(KVPruneError, match=r"a \| b: expected two policies, got"):
        h2o() | wrong


@pytest.mark.parametrize("parts", [(pruner(), h2o()), (h2o(), pruner()), (TokenPolicy(), h2o())])
def test_union_that_would_keep_everything(parts):
    """The error says what to write instead."""
    with pytest.raises(KVPruneError, match=r"share no hook.*pipeline: ComposedCache\(\["):
        parts[0] | parts[1]


# Policies that are wrong themselves.


@pytest.mark.parametrize(
    "names",
    [("attention",), (Attention(), "mass"), "attention", [Attention()], None, (None,), ([],)],
)
def test_statistics_that_nobody_observes(names):
    """Told by the constructor of the cache, alone and in a union."""

    class Wrong(H2O):
        statistics = names

    for policy in (Wrong(2, 3), h2o() | Wrong(2, 3)):
        with pytest.raises(
            KVPruneError,
            match=r"Wrong.*statistics = .*expected a tuple of objects out of kvprune.statistics",
        ):
            ComposedCache([policy])


class Nothing(TokenPolicy):
    """Has no hook."""

    def _rank_slots(self, slots):
        """Nobody asks for this."""


class Misspelt(TokenPolicy):
    """Its hook is never asked."""

    def rank_slot(self, slots):
        """Nobody asks for this."""


class MisspeltToo(H2O):
    """Its second hook is never asked."""

    def rank_hiden(self, tokens):
        """Nobody asks for this."""


class MisspeltWrapper(Around):
    """Its answer would never count."""

    def re_rank(self, slots, ranking):
        """Nobody asks for this."""


class SaysLayers(H2O):
    """A class attribute that every object has of its own."""

    layers = (1,)


class ForLater(H2O):
    """Has a hook that there is not."""

    def rank_everything(self, views):
        """Nobody asks for this."""


class ByObject(TokenPolicy):
    """Its hook is the object's, not the class's."""

    def __init__(self):
        super().__init__()
        self.rank_slots = lambda slots: None


class MisspeltStatistics(H2O):
    """Names what it wants where nobody looks."""

    statistic = ("attention",)


class MisspeltPromise(StreamingLLM):
    """Promises where nobody listens."""

    constant_budgets = True


class MisspeltProperty(StreamingLLM):
    """Promises where nobody listens."""

    @property
    def sink_before_window(self):
        """Nobody asks for this."""
        return 4


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        (
            TokenPolicy(),
            r"would keep everything: expected .* rank_hidden, rank_slots or rank_layers",
        ),
        (Nothing(), r"Nothing\(\) would keep everything: .*got one that defines _rank_slots"),
        (Misspelt(), r"asks for Misspelt\.rank_slot: expected rank_slots"),
        (MisspeltToo(), r"asks for MisspeltToo\.rank_hiden: expected rank_hidden"),
        (MisspeltWrapper(h2o()), r"MisspeltWrapper\.re_rank: expected rerank"),
        (
            SaysLayers(4, 4),
            r"SaysLayers says layers = \(1,\) without a type, which changes nothing",
        ),
        (
            ForLater(),
            r"asks for ForLater\.rank_everything: expected rank_hidden, rank_slots",
        ),
        (ByObject(), r"asks for ByObject\.rank_slots: expected rank_slots, defined in the class"),
        (MisspeltStatistics(), r"MisspeltStatistics\.statistic: expected statistics"),
        (MisspeltPromise(), r"MisspeltPromise\.constant_budgets: expected constant_budget"),
        (MisspeltProperty(), r"MisspeltProperty\.sink_before_window: expected sinks_before_window"),
        (h2o() | MisspeltToo(), r"asks for MisspeltToo\.rank_hiden"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_policy_that_nobody_would_ask(policy, match):
    """Told by the constructor of the cache, and what was meant."""
    with pytest.raises(KVPruneError, match=match):
        ComposedCache([h2o(), policy])


class Helpers(H2O):
    """Has names of its own that look a little like hooks."""

    rank_by = "attention"
    layer = 3

    def ranking(self, slots):
        """A helper."""
        return super().rank_slots(slots)

    def _rank_slot(self, slots):
        return self.ranking(slots)

    def rank_slots(self, slots):
        """Asked."""
        return self._rank_slot(slots)


class Silent(TokenPolicy):
    """Says by itself that it has nothing to do."""

    @property
    def hooks(self):
        """None."""
        return frozenset()


@pytest.mark.parametrize("policy", [Helpers(2, 3), Silent(), h2o() | h2o()], ids=repr)
def test_policy_with_helpers_or_hooks_of_its_own(policy):
    """A helper is no misspelt hook, and what `hooks` says is true."""
    filled(policy)


@pytest.mark.parametrize(
    "layers", [[LAYERS], [-1], [0, 9], ["1"], "01", [1.0], [True], [None], 2, 2.5, True, object()]
)
def test_layers_that_the_model_has_not(layers):
    """Told on first use, by forward and by generate, alone and in a union."""
    ids, model = prompt(1, LENGTH), tiny_model()
    for policy in (h2o(layers=layers), h2o() | h2o(layers=layers), pruner(layers=layers)):
        cache = ComposedCache([policy])
        for use in (model, partial(model.generate, max_new_tokens=2)):
            with pytest.raises(KVPruneError, match=r"layers=.*expected layers of 0 to 3"):
                use(ids, past_key_values=cache)
            assert held(cache) == (0, 0, -1, []) and len(cache) == 0


class Faulty(TokenPolicy):
    """Keeps the newest six, until `fault` is set and makes something else of the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: Callable[[Ranking], Any] | None = None

    def answer(self, columns: Tensor, layer: int) -> Any:
        """Faults come in a middle layer, when others are done already."""
        nothing, six = columns < -1, torch.full((columns.shape[0],), 6)
        ranking = Ranking(columns.double(), nothing, six)
        return self.fault(ranking) if self.fault is not None and layer == 2 else ranking


class FaultySlots(Faulty):
    """Faulty in evicting."""

    def rank_slots(self, slots):
        """See `Faulty`."""
        return self.answer(slots.columns, slots.layer)


class FaultyHidden(Faulty):
    """Faulty in pruning."""

    def rank_hidden(self, tokens):
        """See `Faulty`."""
        return self.answer(tokens.columns[:, None], tokens.layer)


def _with(name: str, change: Callable[[Tensor], Any]) -> Callable[[Ranking], Ranking]:
    return lambda ranking: replace(ranking, **{name: change(getattr(ranking, name))})


FAULTS: list[tuple[Callable[[Ranking], Any], str]] = [
    (lambda r: "all of them", "a kvprune.Ranking or None, got str"),
    (lambda r: (r.score, r.protected, r.budget), "a kvprune.Ranking or None, got tuple"),
    (lambda r: r.score, "a kvprune.Ranking or None, got Tensor"),
    (lambda r: True, "a kvprune.Ranking or None, got bool"),
    (_with("score", lambda t: t[..., 1:]), "score as a float tensor"),
    (_with("score", lambda t: t[:1]), "score as a float tensor"),
    (_with("score", lambda t: t[:, 0]), "score as a float tensor"),
    (_with("score", lambda t: t.expand(-1, 3, -1)), "score as a float tensor"),
    (_with("score", lambda t: t.long()), "score as a float tensor"),
    (_with("score", lambda t: t > 0), "score as a float tensor"),
    (_with("score", lambda t: t + 1j), "score as a float tensor"),
    (_with("score", lambda t: t.tolist()), "score as a float tensor"),
    (_with("score", lambda t: t.where(t < t.max(), NAN)), "scores that can be compared, got NaN"),
    (_with("protected", lambda t: t[..., 1:]), "protected as a bool tensor"),
    (_with("protected", lambda t: t[:, 0]), "protected as a bool tensor"),
    (_with("protected", lambda t: t.long()), "protected as a bool tensor"),
    (_with("protected", lambda t: t.double()), "protected as a bool tensor"),
    (_with("protected", lambda t: None), "protected as a bool tensor"),
    (_with("score", lambda t: t.to(torch.float8_e4m3fn)), "score as a float tensor"),
    (_with("score", lambda t: t.to("meta")), "score on cpu, where its view is, got meta"),
    (_with("budget", lambda t: t.to("meta")), "budget on cpu, where its view is, got meta"),
    (_with("budget", lambda t: t.to(torch.uint16)), "budget as a int tensor"),
    (_with("budget", lambda t: t.double()), "budget as a int tensor"),
    (_with("budget", lambda t: t > 0), "budget as a int tensor"),
    (_with("budget", lambda t: t[:1]), "budget as a int tensor"),
    (_with("budget", lambda t: t[0]), "budget as a int tensor"),
    (_with("budget", lambda t: t[:, None, None]), "budget as a int tensor"),
    (_with("budget", lambda t: t[:, None].expand(-1, 3)), "budget as a int tensor"),
    (_with("budget", lambda t: 6), "budget as a int tensor"),
    (_with("budget", lambda t: None), "budget as a int tensor"),
    (_with("budget", lambda t: t * 0), r"at layer 2 budgets that .* down to 0 in rows \[0, 1\]"),
    (_with("budget", lambda t: -t), r"at layer 2 budgets that .* down to -6 in rows \[0, 1\]"),
    (_with("budget", lambda t: t - 6 * t.new_tensor([0, 1])), r"at layer 2 .* in rows \[1\]"),
    (_with("budget", lambda t: (t * 0)[:, None]), r"at layer 2 budgets .* in rows \[0, 1\]"),
]


def assert_breaks(policy: Faulty, error: type[BaseException], match: str, refusal: str) -> None:
    """The error ends the forward; the cache is out of use until reset, and then as new."""
    ids, model = prompt(2, LENGTH), tiny_model()
    fault, policy.fault = policy.fault, None
    cache = ComposedCache([policy])
    model(ids, past_key_values=cache)
    policy.fault = fault
    with pytest.raises(error, match=match):
        model(ids, past_key_values=cache)
    policy.fault = None
    assert_unusable(cache, refusal)
    cache.reset()
    assert held(cache) == (0, 0, -1, [])
    assert_same_future(cache, ComposedCache([policy]))


FAILED = r"cannot be used any more.*Call cache\.reset\(\) and hand in the prompt again"


@pytest.mark.parametrize(("fault", "match"), FAULTS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("kind", [FaultySlots, FaultyHidden])
def test_answer_that_is_no_ranking(kind, fault, match):
    """The error names the policy, what was expected and what came."""
    policy = kind()
    policy.fault = fault
    match = rf"{kind.__name__}\(\): expected {match}.*Mend the policy's hook"
    assert_breaks(policy, KVPruneError, match, FAILED)


@pytest.mark.parametrize(
    ("name", "change"),
    [("score", Tensor.long), ("protected", Tensor.long), ("budget", Tensor.double)],
)
def test_answer_that_is_no_ranking_in_a_pipeline_or_union(name, change):
    """The part that gave it is named."""
    ids, model = prompt(2, LENGTH), tiny_model()
    for compose in (lambda p: [h2o(), p], lambda p: [p, h2o()], lambda p: [p | h2o()]):
        policy = FaultySlots()
        policy.fault = _with(name, change)
        with pytest.raises(KVPruneError, match=rf"^FaultySlots\(\): expected {name}"):
            model(ids, past_key_values=ComposedCache(compose(policy)))


@pytest.mark.parametrize("kind", [FaultySlots, FaultyHidden])
def test_budget_below_0_where_all_is_protected(kind):
    """It is no budget, whatever stays."""
    policy = kind()
    policy.fault = lambda r: replace(r, budget=r.budget * 0 - 1, protected=~r.protected)
    assert_breaks(policy, KVPruneError, r"down to -1 in rows \[0, 1\]", FAILED)


@pytest.mark.parametrize("kind", [FaultySlots, FaultyHidden])
def test_budget_of_0_with_something_protected(kind):
    """The budget is raised to it; a row of padding has nothing to keep."""
    policy, ids = kind(), prompt(2, LENGTH)
    policy.fault = lambda r: replace(r, budget=r.budget * 0, protected=r.score >= LENGTH - 2)
    cache, mask = ComposedCache([policy]), torch.ones_like(ids)
    mask[1] = 0
    tiny_model()(ids, attention_mask=mask, past_key_values=cache)
    layer = 2 if kind is FaultySlots else 3
    assert cache.columns(layer)[:, 0].tolist() == [[8, 9], [-1, -1]]


def test_budget_of_0_in_decoding():
    """Told in a step of one token too, and by the part of a union that says it."""
    ids, model = prompt(1, LENGTH), tiny_model()
    for compose in (lambda p: [p], lambda p: [p, h2o()], lambda p: [h2o() | p]):
        policy = FaultySlots()
        cache = ComposedCache(compose(policy))
        model(ids, past_key_values=cache)
        policy.fault = _with("budget", torch.zeros_like)
        with pytest.raises(KVPruneError, match=r"^FaultySlots\(\): .*down to 0 in rows \[0\]"):
            model(ids[:, :1], past_key_values=cache)


class OwnError(Exception):
    """What a policy raises by itself."""


@pytest.mark.parametrize("kind", [FaultySlots, FaultyHidden])
@pytest.mark.parametrize("error", [OwnError, ZeroDivisionError, KVPruneError])
def test_error_of_a_policy_comes_through_as_it_is(kind, error):
    """Neither swallowed nor wrapped."""

    def fail(ranking):
        raise error("of its own")

    policy = kind()
    policy.fault = fail
    assert_breaks(policy, error, "^of its own$", FAILED)


@pytest.mark.parametrize("kind", [FaultySlots, FaultyHidden])
def test_forward_that_was_interrupted(kind):
    """Ctrl-C runs no hooks of torch; the cache is out of use all the same."""

    def interrupt(ranking):
        raise KeyboardInterrupt("by hand")

    policy = kind()
    policy.fault = interrupt
    assert_breaks(policy, KeyboardInterrupt, "by hand", r"cache\.reset\(\)")


def test_error_while_decoding():
    """`generate` ends with the policy's error; the cache is out of use until reset."""
    policy, ids, model = FaultySlots(), prompt(2, LENGTH), tiny_model()
    cache = ComposedCache([policy])

    def fail_later(ranking):
        if cache.seen == LENGTH + 2:
            raise OwnError("late")
        return ranking

    policy.fault = fail_later
    with pytest.raises(OwnError, match="late"):
        model.generate(ids, cache=cache, max_new_tokens=6)
    assert cache.seen == LENGTH + 2
    policy.fault = None
    assert_unusable(cache, FAILED)
    cache.reset()
    assert_same_future(cache, ComposedCache([policy]))


class Asks(TokenPolicy):
    """Asks for a statistic that it did not name."""

    def rank_slots(self, slots):
        """Raises."""
        return slots.statistic(Attention())


class AsksTokens(TokenPolicy):
    """Asks for a statistic that it did not name."""

    def rank_hidden(self, tokens):
        """Raises, from layer 1 on."""
        return tokens.statistic(Attention()) if tokens.layer else None


class AsksEarly(TokenPolicy):
    """Asks before the first layer, where nothing can have been observed."""

    statistics = (Attention(),)

    def rank_hidden(self, tokens):
        """Raises."""
        return tokens.statistic(Attention())


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        (Asks(), "Attention.* was not observed.*Name it in .*`statistics`"),
        (AsksTokens(), "Attention.* was not observed.*Name it in .*`statistics`"),
        (AsksEarly(), "nothing of Attention.* is known here: before layer 0"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_statistic_that_was_not_named(policy, match):
    """The error says where to name it, or that there is none before layer 0."""
    cache = ComposedCache([policy])
    with pytest.raises(KVPruneError, match=match):
        tiny_model()(prompt(2, LENGTH), past_key_values=cache)
    assert_unusable(cache, FAILED)


@pytest.mark.parametrize("other", [h2o(), StreamingLLM(1, 4)], ids=repr)
def test_statistic_that_another_policy_named(other):
    """What others want is not for those who did not name it: results must not hang on them."""
    with pytest.raises(KVPruneError, match=r"Attention.* was not observed"):
        tiny_model()(prompt(2, LENGTH), past_key_values=ComposedCache([Asks(), other]))


class Writes(TokenPolicy):
    """Keeps the newest six, and writes into what it is shown once `into` says where."""

    statistics = (Attention(),)

    def __init__(self, into: str) -> None:
        super().__init__()
        self.into = into

    def _write(self, view: Any) -> None:
        shown = {
            "tokens": lambda: view.tokens(0.5),
            "statistic": lambda: view.statistic(Attention()),
        }
        tensor = shown[self.into]() if self.into in shown else getattr(view, self.into)
        tensor[..., :1] = tensor[..., -1:] if tensor.dtype == torch.bool else 3


class WritesSlots(Writes):
    """In evicting."""

    def rank_slots(self, slots):
        """In a middle layer, and once more in decoding."""
        if slots.layer == 2:
            self._write(slots)
        six = torch.full_like(slots.first, 6)
        return Ranking(slots.columns.double(), slots.newest(2), six)


class WritesHidden(Writes):
    """In pruning."""

    def rank_hidden(self, tokens):
        """In a middle layer."""
        if tokens.layer == 2:
            self._write(tokens)


SHARED = ["columns", "valid", "first", "tokens", "statistic"]
WRITES = [
    *((WritesSlots, name) for name in (*SHARED, "keys", "values", "prompt_length")),
    *((WritesHidden, name) for name in (*SHARED, "hidden", "length")),
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize(("kind", "into"), WRITES)
def test_policy_that_writes_into_its_view(kind, into, mode):
    """Refused: alone, as the second of a pipeline, and as a part of a union."""
    ids, model, policy = prompt(2, LENGTH), tiny_model(), kind(into)
    match = rf"{kind.__name__}\(\) wrote into its view at layer 2: expected .* only reads"
    for pipeline in ([policy], [h2o(), policy], [policy | policy]):
        cache = ComposedCache(pipeline)
        with mode(), pytest.raises(KVPruneError, match=match):
            model(ids, past_key_values=cache)
        assert_unusable(cache, FAILED)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("alike", [False, True])
def test_policy_that_writes_into_its_view_in_decoding(mode, alike):
    """Also at a full budget, where nothing of an answer is looked at, and layers are one."""

    class Late(H2O):
        layers_alike = alike

        def rank_slots(self, slots):
            if slots.seen > LENGTH + 2:
                slots.statistic(Attention()).zero_()
            return super().rank_slots(slots)

    ids, model, cache = prompt(2, LENGTH), tiny_model(), ComposedCache([Late(2, 2)])
    with mode():
        model(ids, past_key_values=cache)
        for _ in range(2):
            model(ids[:, :1], past_key_values=cache)
        with pytest.raises(KVPruneError, match="wrote into its view"):
            model(ids[:, :1], past_key_values=cache)


def test_policy_that_writes_into_copies():
    """Its own tensors are its own, and what helpers make is too."""

    class Own(H2O):
        def rank_slots(self, slots):
            received = slots.statistic(Attention()).clone()
            received[..., 0] = 0
            protected = slots.newest(2)
            protected |= slots.oldest(1)
            budget = slots.tokens(4) + 1
            budget += 1
            return Ranking(received, protected, budget)

    filled(Own(2, 2))
