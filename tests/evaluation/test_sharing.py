"""Cells on one reading of each prompt: the same results, to the bit, as each alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.evaluation.compare.sharing import grouped
from kvprune.evaluation.compare.worker import Job
from kvprune.policies import H2O, AdaKV, CriticalKV, Knorm, StreamingLLM
from kvprune.statistics import Attention

from ..support import fake_tasks
from ..support.fake_tasks import FAILING as FAILS
from ..support.fake_tasks import Echo, Likely, saved_model
from ..support.family_models import attached_family
from ..support.models import LAYERS, fresh_model, prompt, tiny_model
from ..support.strategies import sdtp_heads, sdtp_pruner
from .test_compare import FAILING, hears_ctrl_c, no_report, said, small

__all__ = ["hears_ctrl_c", "no_report"]

EVICTING: list[list[Any]] = [
    [],
    [H2O(0.2, 0.2)],
    [H2O(3, 4)],
    [StreamingLLM(1, 0.3)],
    [H2O(0.1, 0.1) | StreamingLLM(2, 5)],
    [H2O(0.3, 0.1, layers=[1, 2]), StreamingLLM(2, 9)],
    [AdaKV(CriticalKV(Knorm(0.3)))],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and a tokenizer."""
    return saved_model(tmp_path_factory.mktemp("model"))


def same(one: ComposedCache, two: ComposedCache) -> bool:
    """To the bit, and goes on so."""
    numbers = [[layer.numbers() for _, layer in c.slot_layers()] for c in (one, two)]
    assert numbers[0] == numbers[1]
    pairs = zip(one.slot_layers(), two.slot_layers(), strict=True)
    tensors = [(a.named_tensors(), b.named_tensors()) for (_, a), (_, b) in pairs]
    assert all(a.keys() == b.keys() for a, b in tensors)
    return all(torch.equal(a[name], b[name]) for a, b in tensors for name in a)


@pytest.mark.parametrize("evicting", EVICTING, ids=repr)
@pytest.mark.parametrize("prunes", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_with_other_policies_is_one_that_had_them(evicting, prunes, padded):
    """After a prompt, and after some tokens more; the cache that it comes from stays."""
    model, ids = tiny_model(), prompt(2, 40)
    mask = torch.ones_like(ids)
    mask[1, : 11 * padded] = 0
    pruners = [sdtp_pruner(0.6)] if prunes else []
    observe = (Attention(),) if any(p.statistics for p in evicting) else ()
    # One that observes in some layers only has other attention, and other bits, in the rest.
    exact = not any(p.layers for p in evicting)
    lead, expected = ComposedCache(pruners, observe), ComposedCache([*pruners, *evicting])
    with torch.no_grad():
        for cache in (lead, expected):
            model(ids, attention_mask=mask, past_key_values=cache)
        before = [lead.columns(i) for i in range(LAYERS)]
        found = lead.with_policies([*pruners, *evicting], model)
        for _ in range(6):
            assert found.seen == expected.seen and repr(found) == repr(expected)
            assert all(torch.equal(found.columns(i), expected.columns(i)) for i in range(LAYERS))
            assert not exact or (same(found, expected) and found.nbytes == expected.nbytes)
            tokens, mask = ids[:, :1], torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            for cache in (found, expected):
                model(tokens, attention_mask=mask, past_key_values=cache)
    assert all(torch.equal(lead.columns(i), columns) for i, columns in enumerate(before))
    assert lead.seen == 40


@pytest.mark.parametrize("padding", [0, 7, 17])
def test_what_was_taken_back_is_no_part_of_the_prompt(padding):
    """A share is one of what is left, also where a row's first token is gone."""
    model, ids, policies = tiny_model(), prompt(2, 24), [StreamingLLM(1, 0.5)]
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    lead, expected = ComposedCache(), ComposedCache(policies)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=lead)
        lead.crop(-8)
        model(ids[:, :16], attention_mask=mask[:, :16], past_key_values=expected)
        found = lead.with_policies(policies, model)
        for _ in range(3):
            assert all(torch.equal(found.columns(i), expected.columns(i)) for i in range(LAYERS))
            mask = torch.cat([mask[:, : found.seen], torch.ones_like(mask[:, :1])], 1)
            for cache in (found, expected):
                model(ids[:, :1], attention_mask=mask, past_key_values=cache)


def test_a_file_of_a_cache_that_evicted_cannot_have_other_policies(tmp_path):
    """What it lacks is unknown; one that evicted nothing can."""
    model, ids = tiny_model(), prompt(1, 20)
    for policies, fine in (([H2O(3, 4)], False), ([], True)):
        read = ComposedCache(policies)
        with torch.no_grad():
            model(ids, past_key_values=read)
        read.save(tmp_path / "cache")
        loaded = ComposedCache.load(tmp_path / "cache", [], model)
        if fine:
            assert loaded.with_policies([StreamingLLM(1, 5)], model).columns(0).shape[-1] == 6
            continue
        with pytest.raises(KVPruneError, match="lacks nothing of what was read"):
            loaded.with_policies([StreamingLLM(1, 5)], model)


def test_statistics_that_nobody_wants_any_more_are_gone():
    """They would be observed, at a cost, and held."""
    model, ids, policies = tiny_model(), prompt(1, 20), [StreamingLLM(1, 5)]
    lead, expected = ComposedCache(observe=(Attention(),)), ComposedCache(policies)
    with torch.no_grad():
        for cache in (lead, expected):
            model(ids, past_key_values=cache)
    found = lead.with_policies(policies, model)
    assert found.nbytes == expected.nbytes and not found.attends_in_pieces


@pytest.mark.parametrize("family", ["gpt2", "qwen3_next", "mistral"])
def test_other_families(family):
    """Local layers, and layers that keep a state."""
    model, ids, policies = attached_family(family), prompt(1, 30), [H2O(3, 4)]
    lead, expected = ComposedCache(observe=(Attention(),)), ComposedCache(policies)
    with torch.no_grad():
        for cache in (lead, expected):
            model(ids, past_key_values=cache)
        found = lead.with_policies(policies, model)
        said = [model(ids[:, :1], past_key_values=cache).logits for cache in (found, expected)]
    assert torch.equal(*said)


def test_what_cannot_have_other_policies():
    """Each is told why, and stays as it was."""
    model, ids = tiny_model(), prompt(1, 20)
    read = {
        "dense": ComposedCache(),
        "evicted": ComposedCache([H2O(3, 4)]),
        "pruned": ComposedCache([sdtp_pruner(0.6)]),
    }
    with torch.no_grad():
        for cache in read.values():
            model(ids, past_key_values=cache)
    refused: list[tuple[ComposedCache, list[Any], Any, str]] = [
        (ComposedCache(), [], model, "is empty"),
        (read["dense"], [], tiny_model("gpt_neox"), "belongs to another"),
        (read["dense"], [], torch.nn.Linear(1, 1), "with_policies: expected a model that kvprune"),
        (read["dense"], [H2O()], model, "not observed: read with ComposedCache"),
        (read["evicted"], [H2O(3, 4)], model, "without policies that evict"),
        (read["pruned"], [], model, "the same ones that prune"),
        (read["dense"], [StreamingLLM(1, 5, positions="cache")], model, "positions"),
    ]
    for cache, policies, with_model, why in refused:
        before = repr(cache)
        with pytest.raises(KVPruneError, match=why):
            cache.with_policies(policies, with_model)
        assert repr(cache) == before
    with pytest.raises(KVPruneError, match=r"observe = .*: expected a tuple"):
        ComposedCache(observe="attention")
    read["dense"].enter_generate()
    with pytest.raises(KVPruneError, match="in the middle of a generate"):
        read["dense"].with_policies([], model)


def test_a_file_says_by_which_weights_it_was_read(tmp_path):
    """Not by those that the model has by the time it gets other policies."""
    model: Any = kvprune.attach(fresh_model())
    cache = ComposedCache()
    with torch.no_grad():
        model(prompt(1, 20), past_key_values=cache)
        next(model.parameters()).add_(1.0)
    cache.with_policies([StreamingLLM(1, 5)], model).save(tmp_path / "cache")
    with pytest.raises(KVPruneError, match="expected a cache of this model"):
        ComposedCache.load(tmp_path / "cache", [StreamingLLM(1, 5)], model)


def specs(tmp_path: Path) -> list[str]:
    """All kinds: alone, pruned before, a union, and what cannot share."""
    sdtp_heads(keep=0.7).float().save_pretrained(tmp_path / "x")
    sdtp = f"sdtp(heads={str(tmp_path / 'x')!r}, min_tokens=8)"
    inside = "streaming(positions='cache')"
    partly = "h2o(layers=[1])"
    pruned = [sdtp, f"{sdtp}+h2o", f"{sdtp}+streaming"]
    at_the_end = f"{fake_tasks.__name__}:AtTheEnd()"
    return ["h2o", "streaming", *pruned, "h2o|streaming", inside, partly, at_the_end]


@pytest.mark.parametrize(
    "task", [Echo(), pytest.param(Likely(), marks=pytest.mark.slow)], ids=["echo", "likely"]
)
def test_results_are_those_of_cells_alone(folder, tmp_path, task):
    """All of them but the times."""
    options: dict[str, Any] = {"policies": specs(tmp_path), "budgets": [0.5, 0.25]}
    options |= {"tasks": [task], "contexts": [20, 30], "samples": 2}
    found = {how: small(folder, executor=how, **options).results for how in ("local", "shared")}
    for results in found.values():
        assert not results.failures
    plain = {how: {untimed(r) for r in results.samples} for how, results in found.items()}
    assert plain["local"] == plain["shared"] and len(plain["local"]) == 2 * 2 * 19
    assert found["local"].traces == found["shared"].traces
    timed = {r.sample for r in found["shared"].samples if r.cell.label == "h2o" and seconds(r)}
    assert timed == {0}
    bare = [r for r in found["shared"].samples if r.cell.label == "no context"]
    alone = {r.sample for r in bare if seconds(r)}
    assert alone == {0, 1}


def seconds(result: Any) -> float | None:
    """Of its prompt."""
    return result.cost.prefill_seconds


def untimed(result: Any) -> str:
    """A result without what depends on the clock."""
    cost = replace(result.cost, prefill_seconds=None, decode_tokens_per_second=None)
    return repr(replace(result, cost=cost))


def test_a_prompt_is_read_once_for_all(folder, tmp_path, monkeypatch):
    """A forward of a whole prompt for each group and sample, beside each cell's first."""
    from kvprune.evaluation.measure import reader

    read, lengths = reader.read_lead, list[int]()

    def noted(model: Any, cache: Any, tokens: Any, *rest: Any) -> None:
        lengths.append(tokens.shape[1])
        read(model, cache, tokens, *rest)

    monkeypatch.setattr(reader, "read_lead", noted)
    small(folder, executor="shared", policies=specs(tmp_path)[:6], budgets=[0.5, 0.25], samples=3)
    # Dense and streaming; H2O and the union; SDTP, alone and with streaming; SDTP and H2O.
    assert len([n for n in lengths if n > 4]) == 12 + 2 * 4


@pytest.mark.usefixtures("hears_ctrl_c")
def test_it_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    """Stopped in the middle of a group's sample."""
    options: dict[str, Any] = {"policies": ["h2o", "h2o|streaming"], "budgets": [0.5, 0.25]}
    options |= {"samples": 4, "out": tmp_path / "out", "executor": "shared"}
    score, count = Echo.score, [0]

    def stops(self: Echo, *asked: Any) -> Any:
        count[0] += 1
        if count[0] == 13:
            raise KeyboardInterrupt
        return score(self, *asked)

    with monkeypatch.context() as patch:
        patch.setattr(Echo, "score", stops)
        with pytest.raises(KeyboardInterrupt):
            small(folder, **options)
    assert sum(said(tmp_path / "out").values()) == 12
    assert not small(folder, **options).failures
    small(folder, **options | {"out": tmp_path / "anew", "executor": "local"})
    assert said(tmp_path / "out") == said(tmp_path / "anew")
    assert set(said(tmp_path / "out").values()) == {1}


@pytest.mark.usefixtures("no_report")
def test_a_cell_that_fails_stops_no_other(folder, tmp_path, monkeypatch):
    """Neither in its group nor elsewhere, whether it fails alone, or in what all share."""
    options: dict[str, Any] = {"policies": [FAILING, "h2o"], "samples": 4, "executor": "shared"}
    monkeypatch.setitem(FAILS, "now", True)
    found = small(folder, **options)
    (failure,) = found.failures
    assert "a mistake" in failure.error and failure.cell.label == FAILING
    counts = {row["label"]: row["samples"] for row in found.rows}
    assert counts == {"dense": 4, "no context": 4, "h2o": 4, FAILING: counts[FAILING]}
    assert counts[FAILING] < 4
    # In its first sample, which is read alone: then it is not tried with the others either.
    found = small(folder, **options, contexts=[24])
    assert {row["label"]: row["samples"] for row in found.rows}[FAILING] == 0
    assert len(found.failures) == 1
    monkeypatch.setattr("kvprune.evaluation.compare.sharing._lead", lambda *_: 1 / 0)
    found = small(folder, **options | {"policies": ["h2o"]})
    assert {f.cell.label for f in found.failures} == {"dense", "h2o"}
    assert {row["label"]: row["samples"] for row in found.rows}["no context"] == 4


def test_groups():
    """By what is read."""
    from kvprune.evaluation.compare.plan import Plan

    stored = "ComposedCache([h2o], store=quantized)"
    policies = ["h2o", "streaming", "h2o(layers=[0])", stored]
    plan = Plan(policies, [Echo()], [20, 30], [0.5, 0.2], 1, 0)
    groups, others = grouped([Job(cell, task, ()) for cell, task in plan.cells()], LAYERS, None)
    assert [len(g.pipelines) for g in groups] == [3, 2, 3, 2]
    assert {job.cell.label for job in others} == {"no context", "h2o(layers=[0])", stored}
