"""Saliency: scores by learned heads, what stays by them, files, and how heads are trained."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.evaluation.specs import canonical, parse
from kvprune.policies import H2O, SDTP, Saliency, SaliencyHeads
from kvprune.policies.saliency import train_saliency
from kvprune.policies.saliency.heads import WEIGHTS
from kvprune.policies.saliency.reading import Reader, Seen
from kvprune.policies.saliency.training import ACCOUNT, SEEN
from kvprune.policies.sdtp import Example
from kvprune.statistics import Survival
from kvprune.testing import check

from ..support.family_models import attached_family
from ..support.models import LAYERS, fresh_model, left_padded, prompt, tiny_model
from ..support.strategies import chunked, sdtp_pruner, seeds

SHAPE = ((2, 2),) * LAYERS


def random_heads(shape: Any = SHAPE, **options: Any) -> SaliencyHeads:
    """Heads in which everything has an effect."""
    sizes = {"width": 4, "kernel": 3, "queries": 5, "near": 2} | options
    with torch.random.fork_rng():
        torch.manual_seed(7)
        heads = SaliencyHeads(shape, **sizes).double()
        for weight in heads.parameters():
            weight.data = torch.rand_like(weight) - 0.5
        for tensor in heads.buffers():
            tensor.data = torch.rand_like(tensor) + 0.5
    return heads.eval().requires_grad_(False)


def gelu(x: Any) -> Any:
    """x times the probability of a normal variable below x."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def said(heads: SaliencyHeads, features: Any, places: Any, known: Any) -> Any:
    """The scores `[L, Hkv, N]` of a row, token by token, in plain numpy.

    Args:
        heads: the heads.
        features: `[L, Hkv, f, N]`, NaN where a slot is missing.
        places: `[4, N]`.
        known: the numbers of the tokens of which anything is known.
    """
    w = {name: tensor.numpy() for name, tensor in heads.state_dict().items()}
    count, width = places.shape[1], w["middle.bias"].shape[0]

    def standard(x: Any, mean: Any, scale: Any) -> Any:
        return np.clip((x - mean) / scale, -6, 6)

    state = np.zeros((count, width))
    for n in known:
        place = standard(places[:, n], w["place_mean"], w["place_scale"])
        state[n] = w["place.weight"] @ place + w["place.bias"]
        for layer in range(len(features)):
            for head in range(len(features[layer])):
                x = features[layer][head][:, n]
                if not np.isnan(x).any():
                    mine = [w[f"layers.{layer}.{name}"][head] for name in ("mean", "scale")]
                    state[n] += standard(x, *mine) @ w[f"layers.{layer}.state"][head]
        state[n] = gelu(state[n])
    kernel = w["neighbours.weight"].shape[-1]
    mixed = np.zeros_like(state)
    for n in range(count):
        mixed[n] = state[n] + w["neighbours.bias"]
        for k in range(kernel):
            at = n + k - kernel // 2
            if 0 <= at < count:
                mixed[n] += w["neighbours.weight"][:, 0, k] * state[at]
        mixed[n] = mixed[n] + gelu(w["middle.weight"] @ mixed[n] + w["middle.bias"])
    found = np.full((len(features), len(features[0]), count), np.nan)
    for layer in range(len(features)):
        out = mixed @ w[f"layers.{layer}.out.weight"].T + w[f"layers.{layer}.out.bias"]
        for head in range(len(features[layer])):
            for n in known:
                x = features[layer][head][:, n]
                if not np.isnan(x).any():
                    mine = [w[f"layers.{layer}.{name}"][head] for name in ("mean", "scale")]
                    alone = standard(x, *mine) @ w[f"layers.{layer}.alone"][head]
                    found[layer, head, n] = alone + out[n, head]
    return found


@given(st.integers(4, 12), st.booleans(), seeds)
def test_heads_score_token_by_token(count, apart, seed):
    """Slots in any order, tokens that layers or heads lack, and columns of no token."""
    heads = random_heads()
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(LAYERS, 2, 7, count, generator=draw, dtype=torch.float64) * 3
    places = torch.randn(1, 4, count, generator=draw, dtype=torch.float64)
    # A token that no layer holds, and others that some lack.
    held = torch.rand(LAYERS, 2 if apart else 1, count, generator=draw) < 0.6
    held[..., 0] = False
    held[..., 1] = True
    layers, known = [], held.flatten(0, 1).any(0)
    masked = features.clone().numpy()
    for layer in range(LAYERS):
        most = int(held[layer].sum(-1).max())
        columns = torch.full((1, len(held[layer]), most + 1), count)
        slots = torch.zeros(1, 2, 7, most + 1, dtype=torch.float64)
        for head in range(2):
            mine = held[layer][head if apart else 0]
            there = mine.nonzero()[:, 0]
            there = there[torch.randperm(len(there), generator=torch.Generator().manual_seed(1))]
            columns[0, head if apart else 0, : len(there)] = there
            slots[0, head, :, : len(there)] = features[layer, head][:, there]
            masked[layer, head][:, ~mine.numpy()] = np.nan
        layers.append((layer, slots, columns))
    found = heads(layers, places, known[None])
    expected = said(heads, masked, places[0].numpy(), known.nonzero()[:, 0].tolist())
    for layer, (_, _, columns) in enumerate(layers):
        for head in range(2):
            each = columns[0].expand(2, -1)[head].tolist()
            for place, column in enumerate(each):
                if column < count:
                    wanted = expected[layer, head, column]
                    assert float(found[layer][0, head, place]) == pytest.approx(wanted, rel=1e-9)


@given(st.integers(7, 24), st.data(), seeds)
@torch.no_grad()
def test_what_stays(length, data, seed):
    """By the probabilities that transformers itself gives, in pieces and beside padding."""
    model: Any = tiny_model()
    heads = random_heads(near=data.draw(st.sampled_from([2, 4, 6])))
    pieces = data.draw(chunked(length))
    padding = data.draw(st.integers(0, min(pieces[0] - 1, 3)))
    sinks, recent, budget = 1, 2, 6
    inputs: Any = left_padded(prompt(2, length, seed), [0, padding])
    cache = ComposedCache([Saliency(budget, sinks, recent, heads)])
    with cache.prompt([length, length - padding]):
        for start, stop in zip([0, *np.cumsum(pieces)[:-1]], np.cumsum(pieces), strict=True):
            mask = inputs["attention_mask"][:, :stop]
            ids = inputs["input_ids"][:, start:stop]
            model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    for row, pad in enumerate((0, padding)):
        ids = inputs["input_ids"][row : row + 1, pad:]
        plain: Any = fresh_model(backend="eager")
        plain.load_state_dict(model.state_dict())
        answer = plain(ids, output_attentions=True)
        count = length - pad
        features = np.zeros((LAYERS, 2, 7, count))
        for layer in range(LAYERS):
            given_by = answer.attentions[layer][0].numpy()
            values = answer.past_key_values.layers[layer].values[0].numpy()
            for head in range(2):
                for one in range(2):
                    newest = given_by[2 * head + one][-heads.queries :]
                    groups = newest[-1:], newest[-heads.near :], newest[: -heads.near]
                    for group, some in enumerate(groups):
                        features[layer, head, 3 * one + group] = some.mean(0) if len(some) else 0
                features[layer, head, 6] = np.linalg.norm(values[head], axis=-1)
        features = np.log(np.maximum(features, 1e-8))
        n = np.arange(count)
        places = np.stack(
            [np.log(count - n), np.log(n + 1), n / count, np.full(count, np.log(count))]
        )
        scores = said(heads, features, places, list(range(count)))
        stays = {i for i in n.tolist() if i < sinks or i >= count - recent}
        ranked = sorted(
            (-scores[layer, head, i], layer, head, i)
            for layer in range(LAYERS)
            for head in range(2)
            for i in range(count)
            if i not in stays
        )
        free = LAYERS * 2 * (budget - len(stays))
        kept = {(layer, head, i) for _, layer, head, i in ranked[:free]}
        for layer in range(LAYERS):
            for head in range(2):
                mine = cache.columns(layer)[row].expand(2, -1)[head].tolist()
                expected = {i for i in range(count) if i in stays or (layer, head, i) in kept}
                assert {c - pad for c in mine if c >= 0} == expected


@given(st.integers(20, 30), seeds)
@torch.no_grad()
def test_how_far_tokens_came(length, seed):
    """Without heads of its own: the columns that survive longest, in each layer alike."""
    model, ids = tiny_model(), prompt(1, length, seed)
    watched = ComposedCache([sdtp_pruner(0.6)], observe=(Survival(),))
    model(ids, past_key_values=watched, logits_to_keep=1)
    cache = ComposedCache([sdtp_pruner(0.6), Saliency(7, 1, 2, "survival")])
    model(ids, past_key_values=cache, logits_to_keep=1)
    for layer in range(LAYERS):
        slots = watched.layers[layer]
        came = dict(
            zip(
                slots.columns[0, 0].tolist(),
                slots.statistics[Survival()][0, 0].tolist(),
                strict=True,
            )
        )
        stays = {0, length - 2, length - 1}
        ranked = sorted(set(came) - stays, key=lambda column: -came[column])
        expected = stays | set(ranked[: 7 - len(stays)])
        assert set(cache.columns(layer)[0, 0].tolist()) == expected


def test_invariants():
    """Those that hold of every policy, alone and in pipelines, with heads and without."""
    mine = random_heads().float()
    check(Saliency(7, 1, 2, mine), roomy=Saliency(500, heads=mine), examples=1)
    check([sdtp_pruner(0.6), Saliency(7, 1, 2, mine, when="prompt"), H2O(3, 3)], examples=1)
    check([sdtp_pruner(0.6), Saliency(7, 1, 2, "survival")], examples=1)


@torch.no_grad()
def test_later_turns_stay():
    """It is asked once: what comes behind the first prompt stays."""
    model, ids = tiny_model(), prompt(1, 30)
    cache = ComposedCache([Saliency(7, 1, 2, random_heads())])
    for piece in (ids[:, :20], ids[:, 20:21], ids[:, 21:]):
        model(piece, past_key_values=cache, logits_to_keep=1)
    for layer in range(LAYERS):
        for head in cache.columns(layer)[0].expand(2, -1).tolist():
            assert set(range(20, 30)) <= set(head)
    held = sum(len({*head} - {-1}) for x in range(LAYERS) for head in cache.columns(x)[0].tolist())
    assert held == (7 + 10) * 2 * LAYERS


def examples(count: int, length: int = 90) -> list[Example]:
    """Made-up ones, of which each two share their beginning."""
    found = []
    for number in range(count):
        ids = prompt(1, length, number // 2)[0].tolist()[:-4] + prompt(1, 4, number)[0].tolist()
        found.append(Example(tuple(ids), tuple(prompt(1, 5, number + 100)[0].tolist())))
    return found


@torch.no_grad()
def test_what_is_learned_from(tmp_path):
    """Heads learn what transformers' own probabilities say; a shared beginning changes nothing."""
    model: Any = fresh_model(backend="eager")
    (example,) = examples(1)
    whole = torch.tensor([example.prompt + example.completion])
    answer = model(whole[:, :-1], output_attentions=True)
    kvprune.attach(model)
    for name in "01":
        (tmp_path / name).mkdir()
    seen = [
        Seen.load(Reader(model, tmp_path / str(shared), (), 8, 2).of(each))
        for shared, each in enumerate(
            (example, Example(example.prompt, example.completion, shared=86))
        )
    ]
    lead = len(example.prompt) - 1
    for layer in range(LAYERS):
        given_by = answer.attentions[layer][0, :, lead : lead + 4, :lead].unflatten(0, (2, 2))
        norms = answer.past_key_values.layers[layer].values[0, :, :lead].norm(dim=-1)
        expected = (given_by.sum(1).amax(1) * norms).log()
        for one in seen:
            order = one.columns[layer].argsort()
            mine = one.wanted[layer][:, order].to(expected)
            torch.testing.assert_close(mine, expected, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(
                one.features[layer][..., order],
                seen[0].features[layer][..., seen[0].columns[layer].argsort()],
            )
            torch.testing.assert_close(one.places, seen[0].places)


def test_heads_learn(tmp_path):
    """Files and figures; a training that was killed while it learned reads nothing anew."""
    model: Any = kvprune.attach(fresh_model())
    stages = []

    def stop(stage: str, done: float) -> None:
        stages.append((stage, done))
        if stage == "learning":
            raise KeyboardInterrupt

    asked: Any = {"width": 8, "held_out": 4, "pruning": [sdtp_pruner(0.9)], "seed": 3}
    with pytest.raises(KeyboardInterrupt):
        train_saliency(model, examples(24), tmp_path, report=stop, **asked)
    read = {path: path.stat().st_mtime_ns for path in (tmp_path / SEEN).iterdir()}
    assert len(read) == 20 and not (tmp_path / WEIGHTS).exists()

    def watch(stage: str, done: float) -> None:
        if stage == "learning":
            files = (tmp_path / SEEN).glob("*.safetensors")
            assert {path: path.stat().st_mtime_ns for path in files} == read
        if stage == "measuring":
            assert (tmp_path / WEIGHTS).exists()

    steps = []

    def stop_later(stage: str, done: float) -> None:
        steps.append(stage)
        if done > 0.6 and stage == "learning":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_saliency(model, examples(24), tmp_path, report=stop_later, **asked)
    learned = []
    heads = train_saliency(
        model,
        examples(24),
        tmp_path,
        report=lambda *said: (watch(*said), learned.append(said)),
        **asked,
    )
    # Two of four epochs were left; what comes out is what a training without a stop makes.
    first = next(done for stage, done in learned if stage == "learning")
    assert steps.count("learning") > 10 and first == pytest.approx(0.5 + 0.25 / 5)
    whole = train_saliency(model, examples(24), tmp_path / "whole", **asked)
    for name, tensor in heads.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name])
    assert not (tmp_path / SEEN).exists()
    account = json.loads((tmp_path / ACCOUNT).read_text())
    assert account["held_out"] == 4
    assert set(account["nats"]) == {
        "dense",
        "saliency 0.25",
        "random 0.25",
        "saliency 0.125",
        "random 0.125",
    }
    again = SaliencyHeads.load(tmp_path)
    for name, tensor in heads.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    # From the folder, in a spec, and on this model alone.
    spec = repr(Saliency(0.5, heads=str(tmp_path)))
    assert repr(parse(canonical(parse(spec)))) == f"[{spec}]"
    model(prompt(1, 90), past_key_values=ComposedCache(parse(spec)), logits_to_keep=1)
    with pytest.raises(KVPruneError, match="kvprune train-saliency"):
        kvprune.read(attached_family("gpt_neox"), ComposedCache(parse(spec)), prompt(1, 90))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_is_learned(family, tmp_path):
    """The best quarter of a prompt's slots, of layers without a window, holds what is wanted."""
    model: Any = attached_family(family)
    few = [*examples(2) * 8, *examples(4)[2:]]
    seen = Seen.load(Reader(model, tmp_path, (), 64, 16).of(few[0]))
    shares = []
    for epochs in (1, 30):
        heads = train_saliency(model, few, tmp_path / "out", held_out=1, width=8, epochs=epochs)
        layers = [
            (n, x[None].float(), seen.columns[n][None, None]) for n, x in seen.features.items()
        ]
        there = torch.zeros(1, 89, dtype=torch.bool)
        for _, _, columns in layers:
            there[0, columns[0, 0]] = True
        scores = dict(zip(seen.features, heads(layers, seen.places[None], there), strict=True))
        free = {n: (columns >= 4) & (columns < 73) for n, columns in seen.columns.items()}
        said = torch.cat([scores[n][0, :, free[n]].flatten() for n in seen.wanted])
        wanted = torch.cat([x[:, free[n]].flatten().float().exp() for n, x in seen.wanted.items()])
        best = said.topk(len(said) // 4).indices
        shares.append(float(wanted[best].sum() / wanted.sum()))
    assert shares[1] > max(shares[0], 0.3)


def test_windows_that_slide():
    """Layers that hold what is in their window alone keep it; the others share the budget."""
    model: Any = attached_family("gemma3_text")
    heads = random_heads()
    cache = ComposedCache([Saliency(8, 1, 2, heads)])
    with torch.no_grad():
        model(prompt(1, 30), past_key_values=cache, logits_to_keep=1)
    windows = [i for i, kind in enumerate(model.config.layer_types) if kind != "full_attention"]
    others = [layer for layer in range(LAYERS) if layer not in windows]
    assert windows and others
    held = [(cache.columns(layer)[0].expand(2, -1) >= 0).sum() for layer in others]
    assert sum(map(int, held)) == 8 * 2 * len(others)
    dense = ComposedCache([])
    with torch.no_grad():
        model(prompt(1, 30), past_key_values=dense, logits_to_keep=1)
    for layer in windows:
        assert torch.equal(*(c.columns(layer).sort().values for c in (cache, dense)))


def test_what_is_refused(tmp_path):
    """Numbers, files, models and pipelines, with the way out."""
    with pytest.raises(KVPruneError, match="above 20"):
        Saliency(20)
    with pytest.raises(KVPruneError, match="above 68"):
        Saliency(68, heads="survival")
    assert Saliency(21).protected == 20 and Saliency(21, 1, 0).protected == 1
    for given_, match in (
        ({"sinks": -1}, "sinks"),
        ({"recent": 1.5}, "recent"),
        ({"budget": 0.0}, "budget"),
        ({"heads": 3}, "heads=3"),
    ):
        with pytest.raises(KVPruneError, match=match):
            Saliency(**given_)
    # No heads ship for the tiny model, so that something has to rank hidden states.
    for heads in (None, "survival"):
        with pytest.raises(KVPruneError, match=r"SDTP\(keep=1\.0\)"):
            tiny_model()(prompt(1, 9), past_key_values=ComposedCache([Saliency(heads=heads)]))
    with pytest.raises(KVPruneError, match=r"SaliencyHeads\.save"):
        tiny_model()(prompt(1, 9), past_key_values=ComposedCache([Saliency(heads=str(tmp_path))]))
    random_heads().save(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for broken in (whole[:40], b"", whole[:-8]):
        (tmp_path / WEIGHTS).write_bytes(broken)
        with pytest.raises(KVPruneError, match=r"SaliencyHeads\.save"):
            SaliencyHeads.load(tmp_path)
    for shape in (((4, 1),) * LAYERS, SHAPE[1:]):
        other = ComposedCache([Saliency(heads=random_heads(shape))])
        with pytest.raises(KVPruneError, match="kvprune train-saliency"):
            tiny_model()(prompt(1, 9), past_key_values=other)
    for name, number in (("width", 0), ("kernel", 2), ("queries", 1.5), ("near", -1)):
        with pytest.raises(KVPruneError, match=f"{name}={number}"):
            random_heads(**{name: number})
    model: Any = tiny_model()
    for few, match in (
        (examples(3), "held out"),
        (examples(30, 21), "more than 21"),
        ([Example(e.prompt, ()) for e in examples(30)], "completions"),
    ):
        with pytest.raises(KVPruneError, match=match):
            train_saliency(model, few, tmp_path / "out")
    for asked, match in (
        ({"batch": 0}, "batch=0"),
        ({"epochs": -1}, "epochs=-1"),
        ({"pruning": [H2O(3, 3)]}, "none that evicts"),
        ({"pruning": 3}, "3"),
    ):
        with pytest.raises(KVPruneError, match=match):
            train_saliency(model, examples(30), tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
    greedy = [SDTP(sdtp_pruner(0.6).heads, keep=0.3, min_tokens=1, local=1)]
    few = [Example(e.prompt, e.completion * 6) for e in examples(30)]
    with pytest.raises(KVPruneError, match="prune long prompts alone"):
        train_saliency(model, few, tmp_path / "out", pruning=greedy)
    broken_model: Any = kvprune.attach(fresh_model())
    with torch.no_grad():
        broken_model.model.layers[0].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(KVPruneError, match="expected numbers"):
        train_saliency(broken_model, examples(30), tmp_path / "out", width=4)


@torch.no_grad()
def test_padding_within_a_row():
    """Tokens are neighbours by their number in the row, whatever padding is between them."""
    model, ids = tiny_model(), prompt(2, 20, 4)
    policy = Saliency(8, 1, 2, random_heads(), when="prompt")
    cache, alone = ComposedCache([policy]), ComposedCache([policy])
    model(ids[:, :10], past_key_values=cache, logits_to_keep=1)
    model(ids[:1, :10], past_key_values=alone, logits_to_keep=1)
    second = ids[:, 10:19].clone()
    second[0] = torch.cat([ids[0, :3], ids[0, 10:16]])
    mask = torch.ones(2, 19, dtype=torch.int64)
    mask[0, 10:13] = 0
    places = torch.tensor([[0, 0, 0, *range(10, 16)], [*range(10, 19)]])
    forward = {"past_key_values": cache, "logits_to_keep": 1}
    model(second, attention_mask=mask, position_ids=places, **forward)
    model(ids[:1, 10:16], past_key_values=alone, logits_to_keep=1)
    for layer in range(LAYERS):
        both = [c.columns(layer)[0].expand(2, -1).tolist() for c in (cache, alone)]
        for mine, other in zip(*both, strict=True):
            numbers = {c - 3 * (c >= 13) for c in mine if c >= 0}
            assert numbers == {c for c in other if c >= 0}


@torch.no_grad()
def test_pruning_by_heads_and_evicting_go_together():
    """Behind SDTP that keeps everything, sets are those without it."""
    model, ids = tiny_model(), prompt(2, 30)
    kept = []
    for before in ([], [SDTP(sdtp_pruner(0.6).heads, keep=1.0)]):
        cache = ComposedCache([*before, Saliency(7, 1, 2, random_heads())])
        model(ids, past_key_values=cache, logits_to_keep=1)
        kept.append([cache.columns(layer).sort().values for layer in range(LAYERS)])
    for one, other in zip(*kept, strict=True):
        assert torch.equal(one, other)
