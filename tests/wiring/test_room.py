"""A share for a number of bytes: the cache takes no more, and hardly less."""

from __future__ import annotations

from typing import Any

import pytest

import kvprune
from kvprune import ComposedCache, KVPruneError, Quantized, TokenPolicy
from kvprune.policies import H2O, AdaKV, Knorm, SnapKV, StreamingLLM

from ..support.family_models import attached_family
from ..support.models import plain_model, prompt, tiny_model
from ..support.strategies import sdtp_pruner

TOKENS = 400


def with_share(policies: list[Any], share: float) -> list[Any]:
    """The pipeline with this budget in each policy that has one."""
    return [policy.with_budget(share) or policy for policy in policies]


@pytest.mark.parametrize("store", [None, Quantized(8, 4)], ids=["plain", "coded"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "deepseek_v3"])
@pytest.mark.parametrize(
    "policies",
    [[H2O()], [AdaKV(SnapKV(0.5, window=8))], [Knorm(0.5, layers=[1])], [StreamingLLM(1, 0.5)]],
    ids=repr,
)
def test_the_cache_takes_so_many_bytes(policies: list[TokenPolicy], family: str, store: Any):
    """Behind a prompt, in two rows, after some tokens more."""
    model: Any = tiny_model() if family == "llama" else attached_family(family)
    whole = ComposedCache(with_share(policies, 1.0), store=store)
    kvprune.read(model, whole, prompt(2, TOKENS))
    for part in (0.95, 0.85):
        wanted = int(whole.nbytes * part)
        share = kvprune.share_for_bytes(model, wanted, TOKENS, policies, store=store, rows=2)
        assert 0 < share <= 1 and (share * TOKENS) == pytest.approx(round(share * TOKENS))
        cache = ComposedCache(with_share(policies, share), store=store)
        kvprune.read(model, cache, prompt(2, TOKENS))
        assert 0.85 * wanted < cache.nbytes <= wanted


def test_tokens_that_follow():
    """They are counted in, for policies that let them stay."""
    model, given = tiny_model(), {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    share = kvprune.share_for_bytes(model, 150_000, TOKENS, [Knorm()], new=40)
    assert share < kvprune.share_for_bytes(model, 150_000, TOKENS, [Knorm()])
    cache = ComposedCache([Knorm(share)])
    model.generate(prompt(1, TOKENS), cache=cache, **given)
    assert 0.85 * 150_000 < cache.nbytes <= 150_000


def test_what_fits_is_kept_whole():
    """A share is no more than all."""
    assert kvprune.share_for_bytes(tiny_model(), 10**9, 50, [H2O()]) == 1.0


def test_what_cannot_be():
    """Says how many bytes it takes."""
    model = tiny_model()
    for match, given in (
        ("nbytes: expected an int of at least 1, got 0. Bytes are a whole", (0, 10, [H2O()])),
        ("tokens: expected an int of at least 1, got 1.5", (10, 1.5, [H2O()])),
        ("expected a policy that evicts", (10**6, 10, [sdtp_pruner(0.5)])),
        ("expected a policy that evicts", (10**6, 10, [])),
        ("expected at least [0-9]+. Take a store", (100, 10, [H2O()])),
    ):
        with pytest.raises(KVPruneError, match=match):
            kvprune.share_for_bytes(model, *given)
    with pytest.raises(KVPruneError, match="new: expected an int of at least 0, got -1"):
        kvprune.share_for_bytes(model, 10**6, 10, [H2O()], new=-1)
    for unattached in (None, plain_model()):
        with pytest.raises(KVPruneError, match=r"share_for_bytes: .*attach"):
            kvprune.share_for_bytes(unattached, 10**6, 10, [H2O()])
    with pytest.raises(KVPruneError, match="at least") as caught:
        kvprune.share_for_bytes(model, 1000, 100, [H2O()])
    least = int(str(caught.value).partition("at least ")[2].partition(".")[0])
    assert kvprune.share_for_bytes(model, least, 100, [H2O()]) == 0.01
    with pytest.raises(KVPruneError):
        kvprune.share_for_bytes(model, least - 10, 100, [H2O()])
