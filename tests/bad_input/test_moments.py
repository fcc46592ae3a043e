"""Times at which policies are asked, windows of queries, and announced prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.policies import (
    TOVA,
    ExpectedAttention,
    FastKV,
    KeyDiff,
    Knorm,
    ObservedAttention,
    PyramidKV,
    SnapKV,
)
from kvprune.statistics import Attention, Queries, QueryMoments

from ..support.family_models import attached_family
from ..support.models import fresh_model, prompt, tiny_model
from .checks import LENGTH, NAN, assert_same_future, filled, held


@pytest.mark.parametrize("when", [0, -1, 2.5, True, "promt", "", (), NAN], ids=repr)
@pytest.mark.parametrize("make", [Knorm, SnapKV, TOVA], ids=lambda m: m.__name__)
def test_when_that_is_no_time(make, when):
    """Refused by the cache that the policy is handed to."""
    with pytest.raises(KVPruneError, match=r"when=.*expected None \(in every forward\), 'prompt'"):
        ComposedCache([make(0.5, when=when)])


@pytest.mark.parametrize("window", [0, -3, 2.0, True, None, "8"], ids=repr)
@pytest.mark.parametrize("make", [SnapKV, PyramidKV, FastKV], ids=lambda m: m.__name__)
def test_window_that_is_no_number_of_tokens(make, window):
    """At least one query has to look."""
    with pytest.raises(KVPruneError, match=r"window=.*expected a number of tokens, at least 1"):
        make(0.5, window=window)


@pytest.mark.parametrize("make", [SnapKV, PyramidKV, FastKV], ids=lambda m: m.__name__)
def test_window_longer_than_the_model_s_context(make):
    """Known with the model; the cache goes on being of use to another one."""
    model, cache = tiny_model(), ComposedCache([make(0.5, window=9999)])
    with pytest.raises(KVPruneError, match="window=9999: expected at most the model's context"):
        model(prompt(1, 5), past_key_values=cache)
    assert cache.seen == 0


@pytest.mark.parametrize("kernel", [0, 2, -1, 3.0, True, None], ids=repr)
@pytest.mark.parametrize("make", [SnapKV, PyramidKV, FastKV], ids=lambda m: m.__name__)
def test_kernel_that_has_no_middle(make, kernel):
    """Of a policy that pools."""
    with pytest.raises(KVPruneError, match=r"kernel=.*expected an odd number of neighbours"):
        make(0.5, kernel=kernel)


@pytest.mark.parametrize("pooling", ["mean", "Max", None, 3], ids=repr)
@pytest.mark.parametrize("make", [SnapKV, PyramidKV, FastKV], ids=lambda m: m.__name__)
def test_pooling_that_nobody_knows(make, pooling):
    """The two that there are, are named."""
    with pytest.raises(KVPruneError, match=r"pooling=.*expected 'max' or 'average'"):
        make(0.5, pooling=pooling)


@pytest.mark.parametrize("budget", [1, 7, 8], ids=repr)
@pytest.mark.parametrize("make", [SnapKV, PyramidKV, FastKV], ids=lambda m: m.__name__)
def test_budget_without_room_beside_the_window(make, budget):
    """In tokens; of a share nobody knows before the prompt."""
    with pytest.raises(KVPruneError, match=r"expected more tokens than the window \(8\)"):
        make(budget, window=8)


@pytest.mark.parametrize("budget", [0, -1, 1.5, 0.0, NAN, True, "0.5", None], ids=repr)
@pytest.mark.parametrize(
    "make",
    [SnapKV, PyramidKV, TOVA, KeyDiff, Knorm, ObservedAttention, FastKV, ExpectedAttention],
)
def test_budget_that_is_none(make, budget):
    """Of every policy with one budget."""
    with pytest.raises(KVPruneError, match=f"^{make.__name__}: (budget|keep)"):
        make(budget)


@pytest.mark.parametrize("beta", [0, 0.5, -1, NAN, float("inf"), None, True, "20"], ids=repr)
def test_pyramid_that_is_none(beta):
    """The last layers keep no more than the first ones."""
    with pytest.raises(KVPruneError, match=r"beta=.*expected a number of at least 1"):
        PyramidKV(0.5, beta=beta)


@pytest.mark.parametrize("layer", [0, -1, 1.0, True, "1"], ids=repr)
def test_layer_with_none_before_it(layer):
    """There, nothing was observed."""
    with pytest.raises(KVPruneError, match=r"layer=.*expected a decoder layer behind the first"):
        FastKV(0.5, layer=layer)


def test_layer_that_the_model_has_not():
    """Known with the model."""
    cache = ComposedCache([FastKV(0.5, layer=4)])
    with pytest.raises(
        KVPruneError, match="layer=4: expected a layer behind one with attention, of 4: 1, 2, 3"
    ):
        tiny_model()(prompt(1, 5), past_key_values=cache)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, None], ids=repr)
def test_queries_of_no_number(count):
    """The statistic itself says so."""
    with pytest.raises(KVPruneError, match="expected a whole number of queries, at least 1"):
        Queries(count)


@pytest.mark.parametrize("skip", [-1, 2.0, True, None], ids=repr)
def test_first_tokens_of_no_number(skip):
    """Those that do not count."""
    with pytest.raises(KVPruneError, match="expected a whole number of tokens, at least 0"):
        QueryMoments(skip)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sinks": -1}, "sinks=-1: expected a number of tokens, at least 0"),
        ({"sinks": 1.0}, "sinks=1.0: expected a number of tokens"),
        ({"sinks": 9}, r"9 tokens: expected more tokens than the sinks \(9\)"),
        ({"future": 0}, "future=0: expected a number of tokens, at least 1"),
        ({"future": True}, "future=True: expected"),
        ({"epsilon": -0.1}, "epsilon=-0.1: expected a number of at least 0"),
        ({"epsilon": NAN}, "epsilon=nan: expected"),
        ({"epsilon": "0"}, "epsilon='0': expected"),
    ],
)
def test_expectation_of_nothing(options, match):
    """Sinks that fill a budget in tokens, a future of no tokens."""
    with pytest.raises(KVPruneError, match=match):
        ExpectedAttention(9, **options)


def test_positions_beyond_the_known_frequencies():
    """Where the model changes how it turns, nobody can turn back; the cache goes on."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model: Any = fresh_model(rope_parameters=rope, max_position_embeddings=32)
    kvprune.attach(model)
    cache, ids = ComposedCache([ExpectedAttention(0.5)]), prompt(1, 30)
    model(ids, past_key_values=cache, logits_to_keep=1)
    with pytest.raises(KVPruneError, match="reach 32, from where on this model changes"):
        model(prompt(1, 3), past_key_values=cache)
    assert cache.seen == 30
    model(prompt(1, 2), past_key_values=cache)


@pytest.mark.parametrize(
    ("over", "decay", "match"),
    [
        ("median", 1.0, "expected 'sum', 'max' or 'mean'"),
        (None, 1.0, "expected 'sum', 'max' or 'mean'"),
        ("sum", -0.1, "decay"),
        ("sum", 1.1, "decay"),
        ("sum", NAN, "decay"),
        ("mean", 0.5, "decay"),
    ],
)
def test_attention_that_is_none(over, decay, match):
    """What is accumulated, and how it fades."""
    with pytest.raises(KVPruneError, match=match):
        Attention(over, decay)


@pytest.mark.parametrize("family", ["bloom", "falcon"])
@pytest.mark.parametrize("policy", [SnapKV(0.5, window=2), FastKV(0.5)], ids=repr)
def test_queries_of_a_model_that_shows_none(family, policy):
    """Named with the family and the reason, before anything is read."""
    model: Any = attached_family(family)
    cache = ComposedCache([policy])
    with pytest.raises(KVPruneError, match=r"Queries\(.*cannot be observed on"):
        model(prompt(1, 5), past_key_values=cache)
    assert cache.seen == 0
    with pytest.raises(KVPruneError, match="observe: "):
        model(prompt(1, 5), past_key_values=ComposedCache([], observe=(Queries(2),)))


@pytest.mark.parametrize("lengths", [0, -1, 2.5, [3, 0], [[3]], [], None, "3", True], ids=repr)
def test_announced_prompt_of_no_length(lengths):
    """Refused before the block begins."""
    cache = filled(Knorm(4))
    before = held(cache)
    match = "expected how many new tokens each row has"
    with pytest.raises(KVPruneError, match=match), cache.prompt(lengths):
        raise AssertionError("the block began")
    assert_same_future(cache, filled(Knorm(4)))
    assert before[0] == LENGTH


def test_announced_prompts_that_do_not_fit():
    """One within another; of other rows; read only in part."""
    model, cache = tiny_model(), ComposedCache([Knorm(4)])
    with cache.prompt(6):
        with (
            pytest.raises(KVPruneError, match="one announced prompt after the other"),
            cache.prompt(3),
        ):
            raise AssertionError("the block began")
        model(prompt(1, 6), past_key_values=cache)
    assert cache.columns(0).shape[-1] == 4
    match = "expected 2 columns more before the end"
    with pytest.raises(KVPruneError, match=match), cache.prompt(5):
        model(prompt(1, 3), past_key_values=cache)
    assert cache.columns(0).shape[-1] == 7
    other = ComposedCache([Knorm(4)])
    with other.prompt([6, 6, 6]):
        with pytest.raises(KVPruneError, match="lengths of 3 rows was announced"):
            model(prompt(2, 6), past_key_values=other)
        model(torch.cat([prompt(2, 6), prompt(1, 6)]), past_key_values=other)
    assert other.columns(0).shape[-1] == 4
