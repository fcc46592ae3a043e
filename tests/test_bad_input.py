"""Everything that can be handed in wrong is refused with an error that says how to mend it.

Where nothing ran yet, the cache is left as it was: it then goes on exactly as an untouched twin
does. Where the error came inside a forward, the cache refuses to be used until `reset()`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor, nn

import kvprune
from kvprune import ComposedCache, KVPruneError, Ranking, TokenPolicy
from kvprune.policies import H2O, SDTP, SDTPHeads, StreamingLLM

from .models import (
    LAYERS,
    fresh_model,
    left_padded,
    plain_model,
    positions,
    prompt,
    tiny_config,
    tiny_model,
)
from .strategies import sdtp_heads

NAN, INF = float("nan"), float("inf")
LENGTH = 10
"""Tokens that a filled cache has seen."""


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def h2o(**options: Any) -> H2O:
    """Evicts half of the prompt, by shares, so that the prompt's length shows; observes."""
    return H2O(heavy=0.2, recent=0.3, **options)


def pruner(**options: Any) -> SDTP:
    """Prunes before layers 1 and 3, in forwards of four tokens or more."""
    stages = {"first_layer": 1, "every": 2, "min_tokens": 4}
    return SDTP(**{"heads": sdtp_heads(2), "keep": 0.6, **stages, **options})


def filled(*policies: TokenPolicy, rows: int = 1) -> ComposedCache:
    """A cache of `tiny_model` that has read a prompt."""
    cache = ComposedCache(policies)
    tiny_model()(prompt(rows, LENGTH), past_key_values=cache)
    return cache


@pytest.fixture(params=["empty", "filled"])
def cache(request) -> ComposedCache:
    """A cache of one row that evicts: new, or in use."""
    return ComposedCache([h2o()]) if request.param == "empty" else filled(h2o())


def held(cache: ComposedCache) -> tuple[Any, ...]:
    """What a user can read off a cache."""
    layers = [cache.columns(i).tolist() for i in range(len(cache))] if cache.is_initialized else []
    return cache.seen, cache.get_seq_length(), cache.batch_size, layers


def follow(model: Any, cache: ComposedCache) -> list[Tensor]:
    """Logits of more tokens: several at once, one alone, and generated ones."""
    rows, size = max(cache.batch_size, 1), model.config.vocab_size
    ids = prompt(rows, 8, seed=7) % size
    logits = [model(part, past_key_values=cache).logits for part in (ids[:, :4], ids[:, 4:5])]
    mask = torch.ones(rows, cache.seen + 3, dtype=torch.long)
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids[:, 5:], attention_mask=mask, past_key_values=cache, **options)
    return [*logits, *out.logits, out.sequences]


def assert_same_future(cache: ComposedCache, twin: ComposedCache, model: Any = None) -> None:
    """Both go on with the very same numbers, and end up with the same columns."""
    model = model or tiny_model()
    got, expected = follow(model, cache), follow(model, twin)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert held(cache) == held(twin)


def assert_refused(
    cache: ComposedCache, match: str, *calls: Callable[[], Any], model: Any = None
) -> None:
    """The calls are refused, again and again, and the cache goes on as an untouched twin."""
    before, twin = held(cache), copy.deepcopy(cache)
    for call in 2 * calls:
        with pytest.raises(KVPruneError, match=match):
            call()
        assert held(cache) == before
    assert_same_future(cache, twin, model)


def assert_unusable(cache: ComposedCache, match: str) -> None:
    """Nothing but `reset()` is possible, and the error says so; nothing has been counted."""
    model: Any = tiny_model()
    more, seen = prompt(2, 2 * LENGTH), cache.seen
    calls: list[Callable[[], Any]] = [
        lambda: model(more, past_key_values=cache),
        lambda: model(more[:, :1], past_key_values=cache),
        lambda: model.generate(more, cache=cache, max_new_tokens=2),
        lambda: cache.crop(0),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
    ]
    for call in calls:
        with pytest.raises(KVPruneError, match=match):
            call()
        assert cache.seen == seen


# Caches and models that do not belong together.


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_model_that_is_not_attached(cache, backend):
    """By forward and by generate (there `cache=` is refused by transformers itself)."""
    other, ids = fresh_model(backend=backend), prompt(1, 2 * LENGTH)
    assert_refused(
        cache,
        r"call kvprune\.attach\(model\)",
        lambda: other(ids, past_key_values=cache),
        lambda: other.generate(ids, past_key_values=cache, max_new_tokens=2),
    )


def test_cache_of_another_model():
    """A cache stays with the model that it was first used with, its twin included."""
    other, ids, cache = kvprune.attach(fresh_model()), prompt(1, 2 * LENGTH), filled(h2o())
    assert_refused(
        cache,
        "belongs to another model.*Make a new ComposedCache",
        lambda: other(ids, past_key_values=cache),
        lambda: other.generate(ids, cache=cache, max_new_tokens=2),
        lambda: other.generate(ids, past_key_values=cache, max_new_tokens=2),
        lambda: other(ids, past_key_values=copy.deepcopy(cache)),
    )


# Numbers out of range.

NO_SHARE: list[Any] = [-1, -0.1, 1.5, 2.0, NAN, INF, -INF, True, "0.5", None, [1], 1j]
TOO_FEW: list[Any] = [0, 0.0]
NO_COUNT: list[Any] = [-1, 2.0, 0.5, NAN, True, "4", [1]]


@pytest.mark.parametrize("value", NO_SHARE, ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda v: H2O(heavy=v), "H2O: heavy"),
        (lambda v: H2O(recent=v), "H2O: recent"),
        (lambda v: StreamingLLM(window=v), "StreamingLLM: window"),
        (lambda v: pruner(local=v), "SDTP: local"),
    ],
)
def test_budget_that_is_neither_tokens_nor_a_share(make, name, value):
    """The error names policy, argument and value, and both ways to put it."""
    with pytest.raises(KVPruneError) as caught:
        make(value)
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r}: expected a number of tokens (an int")
    assert "a share of the prompt (a float above 0.0 and up to 1.0)" in message


@pytest.mark.parametrize("value", TOO_FEW, ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda v: H2O(recent=v), "H2O: recent"),
        (lambda v: H2O(heavy=v, recent=v), "H2O: recent"),
        (lambda v: StreamingLLM(window=v), "StreamingLLM: window"),
        (lambda v: StreamingLLM(sinks=0, window=v), "StreamingLLM: window"),
    ],
)
def test_budget_that_would_not_keep_the_newest_token(make, name, value):
    """So a total of zero cannot be put."""
    with pytest.raises(KVPruneError, match=rf"{name}={value!r}: expected .*int of at least 1"):
        make(value)


@pytest.mark.parametrize("value", [*NO_COUNT, None], ids=repr)
@pytest.mark.parametrize(
    ("make", "name", "least"),
    [
        (lambda v: StreamingLLM(sinks=v), "StreamingLLM: sinks", 0),
        (lambda v: pruner(sinks=v), "SDTP: sinks", 0),
        (lambda v: pruner(first_layer=v), "SDTP: first_layer", 0),
        (lambda v: pruner(every=v), "SDTP: every", 1),
        (lambda v: pruner(min_tokens=v), "SDTP: min_tokens", 1),
    ],
)
def test_count_that_is_none(make, name, least, value):
    """Sinks, layers and stages are whole numbers."""
    with pytest.raises(KVPruneError) as caught:
        make(value)
    assert str(caught.value).startswith(f"{name}={value!r}: expected")
    assert f"int of at least {least}" in str(caught.value)


@pytest.mark.parametrize("value", [*NO_COUNT, 0], ids=repr)
def test_stages_that_are_none(value):
    """None alone is allowed: as many as fit."""
    with pytest.raises(KVPruneError, match=r"SDTP: stages=.*expected an int of at least 1"):
        pruner(stages=value)


@pytest.mark.parametrize(
    "value", [0.0, -0.5, 1.1, 2.0, NAN, INF, 0, 2, True, "0.5", None], ids=repr
)
def test_share_that_sdtp_cannot_keep(value):
    """`keep` is a share, never a count."""
    with pytest.raises(KVPruneError, match=r"SDTP: keep=.*expected a share \(a float in \(0, 1\]"):
        pruner(keep=value)


# The learned heads of SDTP.


@pytest.mark.parametrize("heads", [None, "heads.safetensors", SDTPHeads, nn.Linear(32, 2)])
def test_sdtp_without_heads_says_where_to_get_them(heads):
    """Also where the path is passed instead of the heads."""
    with pytest.raises(KVPruneError, match=r"SDTP\(SDTPHeads\.load\(path\)\).*or untrained"):
        SDTP(heads)
    with pytest.raises(KVPruneError, match=r"SDTP\(SDTPHeads\.load\(path\)\).*or untrained"):
        SDTP()


@pytest.mark.parametrize("sizes", [(0, 4, 2), (32, -1, 2), (32, 4, 0), (32.0, 4, 2), (32, 4, "2")])
def test_sdtp_heads_of_no_size(sizes):
    """Every size is a whole number of at least 1."""
    with pytest.raises(KVPruneError, match="SDTPHeads: expected whole numbers of at least 1"):
        SDTPHeads(*sizes)


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        (lambda: pruner(stages=3), r"stages=3 do not fit: .* has room for 2"),
        (lambda: pruner(first_layer=LAYERS), r"do not fit: .* has room for 0"),
        (lambda: pruner(heads=SDTPHeads(16, LAYERS, 2)), "hidden_size.*Load the heads"),
        (lambda: pruner(heads=SDTPHeads(32, LAYERS + 1, 2)), "num_layers.*Load the heads"),
        (lambda: pruner(heads=SDTPHeads(32, LAYERS, 1)), "stages.*Load the heads"),
        (lambda: pruner(heads=SDTPHeads(32, LAYERS, 3)), "stages.*Load the heads"),
        (lambda: pruner(stages=1), "stages.*Load the heads"),
    ],
)
def test_sdtp_that_does_not_fit_the_model(policy, match):
    """Told on first use, whichever that is, alone or in a pipeline; nothing is bound then."""
    ids, model = prompt(1, LENGTH), tiny_model()
    for policies in ([policy()], [h2o(), policy()]):
        cache = ComposedCache(policies)
        for use in (model, partial(model.generate, max_new_tokens=2)):
            with pytest.raises(KVPruneError, match=match):
                use(ids, past_key_values=cache)
            assert held(cache) == (0, 0, -1, []) and len(cache) == 0


def test_cache_refused_by_one_model_works_with_another():
    """Heads of another hidden size leave the cache free for the model that they fit."""
    cache = ComposedCache([pruner(heads=SDTPHeads(16, LAYERS, 2).double())])
    fitting: Any = kvprune.attach(fresh_model(hidden_size=16))
    ids = prompt(1, LENGTH)
    assert_refused(
        cache,
        "hidden_size",
        lambda: tiny_model()(ids, past_key_values=cache),
        lambda: tiny_model().generate(ids, cache=cache, max_new_tokens=2),
        model=fitting,
    )


def whole_file(path: Path) -> bytes:
    """The bytes of a file of heads."""
    SDTPHeads(8, 4, 1).save(path)
    SDTPHeads.load(path)
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_heads_file_that_is_cut_off(tmp_path, share):
    """In its header or in its tensors."""
    path = tmp_path / "heads.safetensors"
    whole = whole_file(path)
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(KVPruneError, match=r"heads\.safetensors.*expected a file that SDTPHeads.s"):
        SDTPHeads.load(path)


SIZES = '{"hidden_size": 8, "num_layers": 4, "stages": 1}'
OURS = {"format": "kvprune.SDTPHeads"}
ALL_BUT_ONE = dict(list(SDTPHeads(8, 4, 1).state_dict().items())[1:])


def _file(tensors: dict[str, Tensor], **metadata: str) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path, metadata=metadata or None)


def _header(**metadata: str) -> Callable[[Path], None]:
    return _file(SDTPHeads(8, 4, 1).state_dict(), **metadata)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_text("keep the salient tokens, drop the others\n" * 9),
        _file({}, **OURS, configuration=SIZES),
        _file(ALL_BUT_ONE, **OURS, configuration=SIZES),
        _header(),
        _header(format="pt"),
        _header(format="another", configuration=SIZES),
        _header(**OURS),
        _header(**OURS, configuration="not JSON"),
        _header(**OURS, configuration="[8, 4, 1]"),
        _header(**OURS, configuration=SIZES.replace("8", "0")),
        _header(**OURS, configuration=SIZES.replace("stages", "steps")),
        _header(**OURS, configuration=SIZES.replace("8", "16")),
    ],
)
def test_heads_file_of_something_else(tmp_path, write):
    """Missing, a folder, a text, or safetensors with another content."""
    path = tmp_path / "heads.safetensors"
    write(path)
    with pytest.raises(KVPruneError, match=r"heads\.safetensors.*expected a file that SDTPHeads.s"):
        SDTPHeads.load(path)


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
        "cache= and past_key_values= were both given: leave out one",
        lambda: model.generate(ids, cache=cache, past_key_values=other, max_new_tokens=2),
        lambda: model.generate(ids, cache=cache, past_key_values=cache, max_new_tokens=2),
        lambda: model.generate(ids, cache=other, past_key_values=cache, max_new_tokens=2),
    )


@pytest.mark.parametrize("wrong", [tf.DynamicCache(), "h2o", 3, [h2o()], h2o(), ComposedCache])
def test_cache_argument_of_a_wrong_type(model, wrong):
    """`cache=` takes a ComposedCache; others go to past_key_values=."""
    came = type(wrong).__name__
    with pytest.raises(KVPruneError, match=rf"cache= expects a ComposedCache, came {came}"):
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
    with pytest.raises(KVPruneError, match=r"a \| b: expected two policies, came"):
        h2o() | wrong


@pytest.mark.parametrize("parts", [(pruner(), h2o()), (h2o(), pruner()), (TokenPolicy(), h2o())])
def test_union_that_would_keep_everything(parts):
    """The error says what to write instead."""
    with pytest.raises(KVPruneError, match=r"share no hook.*pipeline: ComposedCache\(\["):
        parts[0] | parts[1]


# Policies that are wrong themselves.


@pytest.mark.parametrize(
    "names", [("mass",), ("attention", "mass"), "attention", ["mass"], None, (None,), ([],)]
)
def test_statistics_that_nobody_observes(names):
    """Told by the constructor of the cache, alone and in a union."""

    class Wrong(H2O):
        statistics = names

    for policy in (Wrong(2, 3), h2o() | Wrong(2, 3)):
        with pytest.raises(KVPruneError, match=r"Wrong.*statistics.*out of \['attention'\]"):
            ComposedCache([policy])


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
    (lambda r: "all of them", "a kvprune.Ranking or None, came str"),
    (lambda r: (r.score, r.protected, r.budget), "a kvprune.Ranking or None, came tuple"),
    (lambda r: r.score, "a kvprune.Ranking or None, came Tensor"),
    (lambda r: True, "a kvprune.Ranking or None, came bool"),
    (_with("score", lambda t: t[..., 1:]), "score as a float tensor"),
    (_with("score", lambda t: t[:1]), "score as a float tensor"),
    (_with("score", lambda t: t[:, 0]), "score as a float tensor"),
    (_with("score", lambda t: t.expand(-1, 3, -1)), "score as a float tensor"),
    (_with("score", lambda t: t.long()), "score as a float tensor"),
    (_with("score", lambda t: t > 0), "score as a float tensor"),
    (_with("score", lambda t: t + 1j), "score as a float tensor"),
    (_with("score", lambda t: t.tolist()), "score as a float tensor"),
    (_with("score", lambda t: t.where(t < t.max(), NAN)), "scores that can be compared, came NaN"),
    (_with("protected", lambda t: t[..., 1:]), "protected as a bool tensor"),
    (_with("protected", lambda t: t[:, 0]), "protected as a bool tensor"),
    (_with("protected", lambda t: t.long()), "protected as a bool tensor"),
    (_with("protected", lambda t: t.double()), "protected as a bool tensor"),
    (_with("protected", lambda t: None), "protected as a bool tensor"),
    (_with("budget", lambda t: t.double()), "budget as a int tensor"),
    (_with("budget", lambda t: t > 0), "budget as a int tensor"),
    (_with("budget", lambda t: t[:1]), "budget as a int tensor"),
    (_with("budget", lambda t: t[0]), "budget as a int tensor"),
    (_with("budget", lambda t: t[:, None, None]), "budget as a int tensor"),
    (_with("budget", lambda t: t[:, None].expand(-1, 3)), "budget as a int tensor"),
    (_with("budget", lambda t: 6), "budget as a int tensor"),
    (_with("budget", lambda t: None), "budget as a int tensor"),
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
        raise KeyboardInterrupt

    policy = kind()
    policy.fault = interrupt
    assert_breaks(policy, KeyboardInterrupt, "", r"cache\.reset\(\)")


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
        return slots.statistic("attention")


class AsksTokens(TokenPolicy):
    """Asks for a statistic that it did not name."""

    def rank_hidden(self, tokens):
        """Raises, from layer 1 on."""
        return tokens.statistic("attention") if tokens.layer else None


class AsksEarly(TokenPolicy):
    """Asks before the first layer, where nothing can have been observed."""

    statistics = ("attention",)

    def rank_hidden(self, tokens):
        """Raises."""
        return tokens.statistic("attention")


@pytest.mark.parametrize("policy", [Asks(), AsksTokens(), AsksEarly()], ids=repr)
def test_statistic_that_was_not_named(policy):
    """The error says where to name it, and that there is none before layer 0."""
    cache = ComposedCache([policy])
    match = "'attention' was not observed.*Name it in .*`statistics`; before layer 0 there is none"
    with pytest.raises(KVPruneError, match=match):
        tiny_model()(prompt(2, LENGTH), past_key_values=cache)
    assert_unusable(cache, FAILED)


@pytest.mark.parametrize("other", [h2o(), StreamingLLM(1, 4)], ids=repr)
def test_statistic_that_another_policy_named(other):
    """What others want is not for those who did not name it: results must not hang on them."""
    with pytest.raises(KVPruneError, match="'attention' was not observed"):
        tiny_model()(prompt(2, LENGTH), past_key_values=ComposedCache([Asks(), other]))


# Prompts, masks and rows that do not fit what the cache has seen.


def test_prompt_no_longer_than_what_was_seen():
    """It must be all tokens so far and new ones, or new ones with a mask over all columns."""
    model, ids, cache = tiny_model(), prompt(1, LENGTH), filled(h2o())
    embeds = model.get_input_embeddings()(ids)
    assert_refused(
        cache,
        f"the cache has seen {LENGTH} columns: expected all tokens so far and new ones",
        lambda: model.generate(ids[:, :4], cache=cache, max_new_tokens=2),
        lambda: model.generate(ids, cache=cache, max_new_tokens=2),
        lambda: model.generate(input_ids=ids, cache=cache, max_new_tokens=2),
        lambda: model.generate(
            ids[:, :4], attention_mask=torch.ones(1, 4), cache=cache, max_new_tokens=2
        ),
        lambda: model.generate(inputs_embeds=embeds, cache=cache, max_new_tokens=2),
    )


def test_embeddings_no_longer_than_what_was_seen():
    """`generate` takes embeddings of all tokens only, whatever the mask says."""
    model, cache = tiny_model(), filled(h2o())
    embeds = model.get_input_embeddings()(prompt(1, 4))
    mask = torch.ones(1, LENGTH + 4, dtype=torch.long)
    assert_refused(
        cache,
        f"the cache has seen {LENGTH} columns",
        lambda: model.generate(
            inputs_embeds=embeds, attention_mask=mask, cache=cache, max_new_tokens=2
        ),
    )


def test_no_prompt_at_all():
    """`generate` would begin with one begin-of-sequence token, which is less than was seen."""
    model, cache = tiny_model(), filled(h2o())
    assert_refused(
        cache,
        f"the cache has seen {LENGTH} columns",
        lambda: model.generate(cache=cache, max_new_tokens=2),
    )


def masks(rows: int, columns: int) -> list[Tensor]:
    """All ones (which transformers drops early), and with left padding."""
    ones = torch.ones(rows, columns, dtype=torch.long)
    return [ones, left_padded(ones, [1] * rows)["attention_mask"]]


@pytest.mark.parametrize("columns", [2, LENGTH - 1, LENGTH + 1, 3 * LENGTH])
@pytest.mark.parametrize("padded", [False, True])
def test_mask_of_a_wrong_length_for_an_empty_cache(columns, padded):
    """By forward and by generate; the mask covers the prompt exactly."""
    model, ids, cache = tiny_model(), prompt(1, LENGTH), ComposedCache([h2o()])
    mask = masks(1, columns)[padded]
    assert_refused(
        cache,
        f"attention_mask: expected .*came .*{columns}",
        lambda: model(ids, attention_mask=mask, past_key_values=cache),
        lambda: model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=2),
    )


@pytest.mark.parametrize("columns", [2, LENGTH, LENGTH + 2, LENGTH + 4, 2 * LENGTH])
@pytest.mark.parametrize("padded", [False, True])
def test_mask_of_a_wrong_length_for_a_filled_cache(columns, padded):
    """Three new tokens take a mask over all 13 columns."""
    model, ids, cache = tiny_model(), prompt(1, 3), filled(h2o())
    mask = masks(1, columns)[padded]
    assert_refused(
        cache,
        rf"attention_mask: expected .*(\b13\b|10 \+ 3).*came .*{columns}",
        lambda: model(ids, attention_mask=mask, past_key_values=cache),
        lambda: model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=2),
    )


@pytest.mark.parametrize("padded", [False, True])
def test_mask_of_other_rows(padded):
    """As many rows as the prompt has."""
    model, ids, cache = tiny_model(), prompt(1, LENGTH), ComposedCache([h2o()])
    mask = masks(2, LENGTH)[padded]
    assert_refused(
        cache,
        r"attention_mask: expected .*came",
        lambda: model(ids, attention_mask=mask, past_key_values=cache),
        lambda: model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=2),
    )


@pytest.mark.parametrize(
    "shape",
    [(LENGTH,), (1, LENGTH, LENGTH), (1, 1, LENGTH, LENGTH - 1), (1, 1, LENGTH, LENGTH + 2),
     (1, 1, LENGTH - 1, LENGTH), (1, 1, LENGTH + 2, LENGTH), (2, 1, LENGTH, LENGTH),
     (1, 3, LENGTH, LENGTH)],
)  # fmt: skip
def test_mask_of_a_wrong_shape(shape):
    """A forward takes `[B, columns]`, or `[1|B, 1|Hq, Q, columns]`, and nothing like it."""
    model, ids, cache = tiny_model(), prompt(1, LENGTH), ComposedCache([h2o()])
    mask = torch.ones(shape, dtype=torch.bool)
    assert_refused(
        cache,
        "attention_mask: expected .*came",
        lambda: model(ids, attention_mask=mask, past_key_values=cache),
    )


def test_batch_size_that_changes():
    """By forward, by generate and by beams; the error names both ways out."""
    model, ids, cache = tiny_model(), prompt(2, 2 * LENGTH), filled(h2o())
    options: Any = {"cache": cache, "max_new_tokens": 2}
    assert_refused(
        cache,
        "expected 1 rows as before, came 2. Use a new cache, or batch_repeat_interleave",
        lambda: model(ids, past_key_values=cache),
        lambda: model(ids[:, :1], past_key_values=cache),
        lambda: model.generate(ids, **options),
        lambda: model.generate(ids[:1], num_beams=2, **options),
        lambda: model.generate(ids[:1], num_return_sequences=2, do_sample=True, **options),
    )


def right_padded(rows: int, length: int) -> dict[str, Tensor]:
    """The last row ends three columns early."""
    ids, mask = prompt(rows, length), torch.ones(rows, length, dtype=torch.long)
    mask[-1, -3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("rows", [1, 2])
def test_batch_that_is_padded_on_the_right(rows):
    """With a mask or, in generate, without one; the error says which rows and what to set."""
    model, cache, batch = tiny_model(), ComposedCache([h2o()]), right_padded(rows, LENGTH)
    without_mask = {"input_ids": batch["input_ids"]}
    assert_refused(
        cache,
        rf"padded on the right.*in rows \[{rows - 1}\].*tokenizer.padding_side = 'left'",
        lambda: model(**batch, past_key_values=cache),
        lambda: model.generate(**batch, cache=cache, max_new_tokens=2),
        lambda: model.generate(**without_mask, cache=cache, max_new_tokens=2),
    )


def test_later_turn_that_is_padded_on_the_right():
    """A filled cache is handed more tokens, some rows of which end early."""
    model, cache, batch = tiny_model(), filled(h2o(), rows=2), right_padded(2, LENGTH + 5)
    new = {"input_ids": batch["input_ids"][:, -5:], "attention_mask": batch["attention_mask"]}
    assert_refused(
        cache,
        r"padded on the right.*in rows \[1\].*tokenizer.padding_side = 'left'",
        lambda: model(**new, past_key_values=cache),
        lambda: model.generate(**new, cache=cache, max_new_tokens=2),
        lambda: model.generate(**batch, cache=cache, max_new_tokens=2),
    )


HOLES = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1]])
"""A mask with zeros inside its rows, which is padding like any other."""


def assert_lists_no_padding(cache: ComposedCache) -> None:
    """`columns` names nothing that `HOLES` hides."""
    for layer in range(LAYERS):
        for row, columns in enumerate(cache.columns(layer)):
            hidden = (HOLES[row] == 0).nonzero().flatten()
            assert not torch.isin(columns, hidden).any()


@pytest.mark.parametrize("policies", [[], [StreamingLLM(4, 99)], [H2O(99, 99)], [pruner(keep=1.0)]])
def test_zeros_inside_a_mask_are_padding(policies):
    """Not an error: with room for all, the dense model's tokens under the same mask."""
    inputs, options = {"input_ids": prompt(2, 12), "attention_mask": HOLES}, {"max_new_tokens": 6}
    cache = ComposedCache(policies)
    got = tiny_model().generate(**inputs, cache=cache, **options)
    assert torch.equal(got, plain_model().generate(**inputs, **options))
    assert_lists_no_padding(cache)
    everything = [c for c in range(17) if c > 11 or HOLES[0, c]]
    assert [cache.columns(i)[0, 0].tolist() for i in range(LAYERS)] == [everything] * LAYERS


@pytest.mark.parametrize(
    "policies", [[H2O(2, 3)], [StreamingLLM(2, 3)], [pruner(keep=0.9), H2O(2, 3)]]
)
def test_zeros_inside_a_mask_use_up_no_budget(policies):
    """By forward and by generate: five tokens stay in every layer, row and head."""
    model, ids, places = tiny_model(), prompt(2, 12), positions(HOLES)
    for more in (0, 6):
        cache = ComposedCache(policies)
        options: Any = {"attention_mask": HOLES, "past_key_values": cache}
        model.generate(ids, max_new_tokens=more, **options) if more else model(
            ids, position_ids=places, **options
        )
        assert_lists_no_padding(cache)
        for layer in range(LAYERS):
            assert ((cache.columns(layer) >= 0).sum(-1) == 5).all()


# Taking back.


@pytest.mark.parametrize("policies", [[h2o()], [pruner(), StreamingLLM(1, 4)]], ids=repr)
@pytest.mark.parametrize("count", [0, -1, -LENGTH])
def test_crop_of_what_was_evicted(policies, count):
    """Cannot come back; the error says to copy beforehand."""
    cache = filled(*policies)
    assert_refused(cache, "evicted cannot come back.*copy.deepcopy", lambda: cache.crop(count))


@pytest.mark.parametrize("policies", [[], [h2o()], [pruner()]], ids=repr)
@pytest.mark.parametrize("count", [1, LENGTH, -LENGTH - 1])
def test_crop_of_what_is_not_there(policies, count):
    """Positive numbers, and more than were seen."""
    cache = filled(*policies)
    match = rf"crop\({count}\): expected minus the number of columns to take back, at most 10"
    assert_refused(cache, match, lambda: cache.crop(count))


@pytest.mark.parametrize("count", [-1.5, -1.0, "1", None])
def test_crop_of_no_whole_number(count):
    """Columns are counted in whole ones."""
    cache = filled()
    match = "expected minus the number of columns to take back"
    assert_refused(cache, match, lambda: cache.crop(count))


# Models that are refused.


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("encoder-decoder", {}),
    "bart": ("encoder-decoder", {"encoder_attention_heads": 4, "decoder_attention_heads": 4}),
    "bloom": ("AttentionInterface", {}),
    "falcon": ("AttentionInterface", {}),
    "gptj": ("AttentionInterface", {"rotary_dim": 4}),
    "mamba": ("linear_attention", {}),
    "jamba": ("linear_attention", {}),
    "lfm2": ("type conv", {"layer_types": ["conv", "full_attention"] * 2}),
    "bert": ("decoder layers", {}),
    "vit": ("self-attention", {}),
}


def changes(model: nn.Module) -> dict[str, Any]:
    """What `attach` would leave on a model."""
    own = {name: sorted(m.__dict__) for name, m in model.named_modules()}
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    config: Any = getattr(model, "config", None)
    return {"own": own, "hooks": hooks, "backend": getattr(config, "_attn_implementation", None)}


def assert_not_attached(model: Any, match: str) -> None:
    """Refused by name, and left as it was."""
    before = changes(model)
    match = rf"^{type(model).__name__} \(model type '{model.config.model_type}'\) is not.*{match}"
    with pytest.raises(KVPruneError, match=match):
        kvprune.attach(model)
    assert changes(model) == before


@pytest.mark.parametrize("family", REFUSED)
def test_family_that_is_refused_by_name(family):
    """With the reason."""
    reason, more = REFUSED[family]
    assert_not_attached(tf.AutoModel.from_config(tiny_config(family, **more)), reason)


def test_attention_implementation_that_is_refused():
    """The error says how to load the model instead."""
    model = fresh_model(backend="flex_attention")
    assert_not_attached(model, "'flex_attention'; load it with .*'sdpa' or 'eager'")


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), nn.ModuleList(), None, "gpt2", tf.GPT2Model])
def test_model_that_is_none_of_transformers(wrong):
    """A plain module, or no module at all."""
    came = type(wrong).__name__
    with pytest.raises(KVPruneError, match=f"expected a transformers PreTrainedModel, came {came}"):
        kvprune.attach(wrong)


# What cannot work together with a cache that drops tokens.


def test_gradient_checkpointing_in_training(cache):
    """Hides the cache from the layers, so nothing would be stored; evaluation is fine."""
    model: Any = tiny_model()
    ids = prompt(1, LENGTH)
    model.gradient_checkpointing_enable()
    model.train()
    try:
        with torch.enable_grad(), pytest.raises(KVPruneError, match=r"checkpointing_disable.*eval"):
            model(ids, past_key_values=cache)
    finally:
        model.eval()
    twin = copy.deepcopy(cache)
    assert_same_future(cache, twin)
    model.gradient_checkpointing_disable()


@pytest.mark.parametrize("policies", [[pruner()], [h2o(), pruner()]], ids=repr)
def test_labels_with_pruned_hidden_states(policies):
    """A loss over tokens that left early would be wrong; the error says what to do instead."""
    ids, cache = prompt(1, LENGTH), ComposedCache(policies)
    assert_refused(
        cache,
        "labels with a policy that prunes.*logits_to_keep and compute the loss",
        lambda: tiny_model()(ids, labels=ids, past_key_values=cache),
    )


def test_labels_without_pruned_hidden_states_are_fine():
    """Eviction comes after a prompt's attention, so the loss is the dense one."""
    ids = prompt(1, LENGTH)
    got = tiny_model()(ids, labels=ids, past_key_values=ComposedCache([StreamingLLM(1, 2)])).loss
    assert torch.equal(got, plain_model()(ids, labels=ids).loss)


@pytest.mark.parametrize("policies", [[], [h2o()], [pruner()]], ids=repr)
def test_assisted_decoding(policies):
    """By a draft model, by the prompt or by early exit: it takes tokens back."""
    model, ids, cache = tiny_model(), prompt(1, LENGTH), ComposedCache(policies)
    options: Any = {"cache": cache, "max_new_tokens": 4}
    assert_refused(
        cache,
        "not supported.*leave out assistant_model and prompt_lookup_num_tokens",
        lambda: model.generate(ids, assistant_model=plain_model(), **options),
        lambda: model.generate(ids, prompt_lookup_num_tokens=3, **options),
        lambda: model.generate(ids, assistant_early_exit=2, **options),
        cache.activate_past_recording,
    )


def test_generate_batch(model):
    """Has a paged cache of its own; the error names the ways out."""
    with pytest.raises(KVPruneError, match=r"use generate, or kvprune\.detach\(model\)"):
        model.generate_batch([[1, 2, 3]])


def test_attention_implementation_set_after_attach(cache):
    """Refused until attached again, from where the cache goes on."""
    model: Any = tiny_model()
    ids = prompt(1, 2 * LENGTH)
    twin = copy.deepcopy(cache)
    expected = follow(model, copy.deepcopy(cache))
    try:
        model.set_attn_implementation("eager")
        for use in (model, partial(model.generate, max_new_tokens=2)):
            with pytest.raises(KVPruneError, match=r"call kvprune\.attach\(model\) again"):
                use(ids, past_key_values=cache)
        kvprune.attach(model)
        assert_same_future(copy.deepcopy(cache), copy.deepcopy(twin), model)
        for got, other in zip(follow(model, cache), expected, strict=True):
            torch.testing.assert_close(got, other, rtol=1e-9, atol=1e-10)
    finally:
        model.set_attn_implementation("sdpa")
        kvprune.attach(model)


def test_attention_implementation_that_is_not_supported(cache):
    """Attaching again is refused then, and a supported one mends it."""
    model: Any = fresh_model()
    kvprune.attach(model)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(KVPruneError, match=r"'flex_attention'.*'sdpa' or 'eager'"):
        kvprune.attach(model)
    model.set_attn_implementation("sdpa")
    kvprune.attach(model)
    fresh = ComposedCache([h2o()])
    assert_same_future(fresh, copy.deepcopy(fresh), model)
