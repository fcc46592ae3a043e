"""KVzap: gates, their files, how they are trained, and what stays by them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.evaluation.specs import canonical, parse
from kvprune.policies import DMS, AdaKV, KVzap, KVzip
from kvprune.policies.kvzap import KVzapGates, train_gates
from kvprune.policies.kvzap.training import _examples
from kvprune.testing import check

from ..support.family_models import attached_family
from ..support.models import LAYERS, fresh_model, left_padded, prompt, tiny_model


def gates(hidden: int | None = 8, **sizes: int) -> KVzapGates:
    """Random ones for the tiny models."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        given: dict[str, Any] = {"layers": LAYERS, "inputs": 32, "heads": 2} | sizes
        return KVzapGates(**given, hidden=hidden).eval()


@pytest.mark.parametrize("hidden", [None, 8])
def test_scores_are_of_what_enters_attention(hidden):
    """By the layer's own norm, in a batch with padding; exact sets by hand."""
    model: Any = tiny_model()
    ids, padding = prompt(2, 20, 1), [0, 5]
    inputs: Any = left_padded(ids, padding)
    mine = gates(hidden)
    cache = ComposedCache([KVzap(mine, 7, sinks=1, recent=2)])
    entered: dict[int, torch.Tensor] = {}
    hooks = [
        layer.input_layernorm.register_forward_hook(
            lambda _, __, output, at=at: entered.setdefault(at, output)
        )
        for at, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    for layer in range(LAYERS):
        scores = mine(entered[layer].float(), layer)
        for row, pad in enumerate(padding):
            for head in range(2):
                stays = {pad, 18, 19}
                ranked = sorted(
                    set(range(pad, 20)) - stays, key=lambda c: -float(scores[row, head, c])
                )
                kept = cache.columns(layer)[row].expand(2, -1)[head].tolist()
                assert {c for c in kept if c >= 0} == stays | set(ranked[:4])


def test_files_are_read_as_written_and_as_published(tmp_path):
    """Gates come back from what `save` wrote, and from a folder in the published form."""
    mine = gates()
    mine.save(tmp_path / "mine")
    again = KVzapGates.load(tmp_path / "mine")
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    # What transformers' `save_pretrained` writes beside it, and no word of the model.
    del config["model"]
    config |= {"architectures": ["KVzapModel"], "transformers_version": "5.0.0", "dtype": "float32"}
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    states = torch.randn(1, 3, 32)
    assert torch.equal(KVzapGates.load(tmp_path / "mine")(states, 2), mine(states, 2))
    linear = gates(None)
    linear.save(tmp_path / "linear")
    assert KVzapGates.load(tmp_path / "linear").hidden is None
    spec = repr(KVzap(str(tmp_path / "linear"), 0.5))
    assert repr(parse(canonical(parse(spec)))) == f"[{spec}]"
    assert repr(KVzap(tmp_path / "linear", 0.5)) == spec
    assert repr(KVzap(linear, 0.5)) == "KVzap(gates=..., budget=0.5, sinks=4, recent=16)"


def test_the_invariants_hold():
    """Alone, with budgets by head, and by a threshold in every step."""
    check(KVzap(gates(), 6, sinks=1, recent=2), roomy=KVzap(gates(), 500), examples=1)
    check(AdaKV(KVzap(gates(), 6, sinks=1, recent=2)), examples=1, seed=1)
    check(DMS(KVzap(gates(), 1, 1, 1, when=None), 0.0, window=3), examples=1, seed=2)


def test_gates_learn_what_kvzip_says():
    """A made-up model's first layer, whose states are of the tokens alone; and in what order."""
    model: Any = kvprune.attach(fresh_model())
    texts = [prompt(1, 60, seed) for seed in range(12)]
    stages = []
    small: Any = {"epochs": 12, "batch": 64, "report": lambda what, done: stages.append(what)}
    mlp = train_gates(model, texts, hidden=32, **small)
    linear = train_gates(model, texts, hidden=None, **small)
    assert mlp.explained[0] > 0.6 and linear.explained[0] > 0.3
    assert len(mlp.explained) == LAYERS
    assert stages[0] == "reading texts twice" and stages[-1] == "training"
    again = train_gates(model, texts, hidden=32, **small)
    assert again.explained == mlp.explained
    untrained = train_gates(model, texts, hidden=32, **small | {"epochs": 0})
    assert untrained.explained[0] < 0.1
    # Gates of this model, and of no other.
    kvprune.read(model, ComposedCache([KVzap(mlp.gates, 8)]), texts[0])
    other: Any = kvprune.attach(fresh_model(vocab_size=70))
    with pytest.raises(KVPruneError, match="kvprune train-gates"):
        kvprune.read(other, ComposedCache([KVzap(mlp.gates, 8)]), texts[0])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_is_learned_from(family):
    """States of the first reading, and logarithms of the same tokens' scores, also in windows."""
    model: Any = attached_family(family)
    ids, draw = prompt(1, 30, 5), torch.Generator().manual_seed(3)
    found = _examples(model, ids, None, 12, draw)
    chosen = torch.randperm(30, generator=torch.Generator().manual_seed(3))[:12].tolist()
    policy = KVzip(1.0, plus=True)
    cache = ComposedCache([policy])
    entered: list[torch.Tensor] = []
    norms = [layer.input_layernorm for layer in model.model.layers]
    hooks = [n.register_forward_hook(lambda _, __, out: entered.append(out)) for n in norms]
    kvprune.read(model, cache, ids)
    for hook in hooks:
        hook.remove()
    for layer, slots in cache.slot_layers():
        columns = slots.columns[0, 0].tolist()
        there = [column for column in chosen if column in columns]
        states, wanted = found[layer]
        assert len(there) == len(states) == len(wanted) and (layer or there)
        expected = entered[layer][0, there]
        torch.testing.assert_close(states, expected.half(), rtol=1e-3, atol=1e-3)
        scores = slots.statistics[policy.statistics[0]][0]
        for number, column in enumerate(there):
            mine = scores[:, columns.index(column)].log()
            torch.testing.assert_close(wanted[number], mine.float(), rtol=1e-5, atol=1e-5)


def test_windows_that_slide():
    """Layers that hold what is in their window alone are learned from that."""
    model: Any = attached_family("gemma3_text")
    texts = [prompt(1, 30, seed) for seed in range(3)]
    found = train_gates(model, texts, hidden=4, epochs=1, batch=16)
    cache = ComposedCache([KVzap(found.gates, 8, sinks=1, recent=2)])
    kvprune.read(model, cache, texts[0])
    assert max(cache.columns(layer).shape[-1] for layer in range(LAYERS)) == 8


def test_what_is_refused(tmp_path):
    """Files, sizes, families and amounts, with the way out."""
    with pytest.raises(KVPruneError, match=r"config\.json and model\.safetensors"):
        KVzap(tmp_path / "nowhere")
    gates().save(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for broken in (whole[:40], b"", whole[:-8]):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(KVPruneError, match="expected a folder with"):
            KVzapGates.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    for text in ("{", "[]", '{"model_type": "llama"}', '{"model_type": "kvzap"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(KVPruneError, match="expected a folder with"):
            KVzapGates.load(tmp_path)
    gates(hidden=9).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    with pytest.raises(KVPruneError, match="size mismatch"):
        KVzapGates.load(tmp_path)
    mine: Any = gates()
    for given, match in (
        ({"gates": 3}, "gates=3"),
        ({"gates": mine, "budget": 0}, "budget"),
        ({"gates": mine, "recent": -1}, "recent"),
        ({"gates": mine, "sinks": 1.5}, "sinks=1.5"),
    ):
        with pytest.raises(KVPruneError, match=match):
            KVzap(**given)
    with pytest.raises(KVPruneError, match="expected that model"):
        kvprune.read(tiny_model(), ComposedCache([KVzap(gates(inputs=16))]), prompt(1, 9))
    with pytest.raises(KVPruneError, match="without input_layernorm"):
        kvprune.read(attached_family("gpt2"), ComposedCache([KVzap(gates())]), prompt(1, 9))
    with pytest.raises(KVPruneError, match="two texts"):
        train_gates(tiny_model(), [prompt(1, 9)])
    with pytest.raises(KVPruneError, match="without input_layernorm"):
        train_gates(attached_family("gpt2"), [prompt(1, 9)] * 2)


def test_it_is_near_its_teacher():
    """More of what KVzip+ keeps than chance does, on a text that was not learned from."""
    model: Any = kvprune.attach(fresh_model())
    texts = [prompt(1, 60, seed) for seed in range(12)]
    found = train_gates(model, texts[:-1], hidden=32, epochs=12, batch=64)
    kept = []
    for policy in (KVzip(0.25, plus=True, sinks=1), KVzap(found.gates, 0.25, 1, 1)):
        cache = ComposedCache([policy])
        kvprune.read(model, cache, texts[-1])
        columns = cache.columns(0)[0]
        kept.append([set(head) - {-1} for head in columns.expand(2, -1).tolist()])
    shared = sum(len(a & b) for a, b in zip(*kept, strict=True))
    # By chance a quarter of the smaller sets.
    assert shared > 0.5 * sum(min(len(a), len(b)) for a, b in zip(*kept, strict=True))
