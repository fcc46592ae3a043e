"""Heads that ship are found by the model's weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvprune
from kvprune import KVPruneError
from kvprune.evaluation.data.assets import demo_model
from kvprune.policies import SDTP, SDTPHeads
from kvprune.policies.sdtp import fingerprint, shipped, untrained
from kvprune.policies.sdtp.shipped import same_model

from ..support.models import LAYERS, prompt, tiny_config

FAMILIES = ["llama", "qwen3", "mistral-window", "gpt_neox"]


def model_of(family: str = "llama", seed: int = 0, **more: Any) -> Any:
    """A float32 model whose vectors are random, too: they are all 1 or 0 when made."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tiny_config(family, **more)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) / 4)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_precisions_of_one_model_are_the_same_model(family):
    """Each with each; attached or not; and also after a way through JSON."""
    prints = [fingerprint(model_of(family))]
    prints += [fingerprint(model_of(family).to(d)) for d in (torch.float16, torch.bfloat16)]
    prints.append(fingerprint(kvprune.attach(model_of(family))))
    prints += json.loads(json.dumps(prints))
    assert all(same_model(a, b) for a in prints for b in prints)


def test_a_little_noise_in_the_matrices_is_the_same_model():
    """As 4-bit quantisation makes it: some percent."""
    model = model_of()
    before = fingerprint(model)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data += 0.05 * parameter.std() * torch.randn_like(parameter)
    assert fingerprint(model) != before and same_model(fingerprint(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_seed_is_another_model(family):
    """Also where the vectors are as they are made."""
    one, two = model_of(family), model_of(family, seed=1)
    assert not same_model(fingerprint(one), fingerprint(two))
    for model in (one, two):
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    assert not same_model(fingerprint(one), fingerprint(two))


@pytest.mark.parametrize(
    "more",
    [
        {"hidden_size": 64},
        {"intermediate_size": 64},
        {"num_hidden_layers": 3},
        {"vocab_size": 77},
        {"heads": 8},
        {"kv_heads": 4},
    ],
    ids=str,
)
def test_another_field_of_the_architecture_is_another_model(more):
    """Whatever the weights."""
    one, two = fingerprint(model_of()), fingerprint(model_of(**more))
    assert not same_model(one, two)
    (name,) = [n for n, v in one["architecture"].items() if two["architecture"][n] != v]
    assert name.endswith(next(iter(more)).split("kv_")[-1]) or name.startswith("num_")
    assert not same_model(one, {**one, "architecture": two["architecture"]})


@pytest.mark.parametrize("name", ["layers.0.input_layernorm", "norm"])
def test_a_model_with_one_norm_changed_is_another_model(name):
    """A fine-tuned model moves its norms by more than rounding."""
    model = model_of()
    before = fingerprint(model)
    model.model.get_submodule(name).weight.data *= 1.05
    assert not same_model(fingerprint(model), before)


def test_other_names_are_another_model():
    """Other families call their weights otherwise."""
    one = fingerprint(model_of())
    renamed = {f"x.{k}": v for k, v in one["vectors"].items()}
    assert not same_model(one, {**one, "vectors": renamed})


def test_a_model_without_vectors_has_a_fingerprint():
    """OLMo's norms have no weights; its matrices are enough."""
    one, two = (model_of("olmo", seed) for seed in (0, 1))
    assert same_model(fingerprint(one), fingerprint(one.to(torch.bfloat16)))
    assert not same_model(fingerprint(one), fingerprint(two))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where heads ship from, with heads for two models in it."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "pretrained")
    for name, seed in (("another", 1), ("ours", 0)):
        path = tmp_path / "pretrained" / name
        path.mkdir(parents=True)
        heads = untrained(model_of(seed=seed), seed, first_layer=1, every=2, query_heads=0)
        heads.half().save_pretrained(path)
    return tmp_path / "pretrained"


def test_the_heads_of_a_model_are_found(folder):
    """The same object each time, in float32, without gradients."""
    wanted = SDTPHeads.from_pretrained(folder / "ours").float().state_dict()
    found = [SDTP().for_model(m).heads for m in (model_of(), model_of().bfloat16())]
    assert found[0] is found[1] is not None
    assert all(torch.equal(t, wanted[n]) for n, t in found[0].state_dict().items())
    assert {p.dtype for p in found[0].parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in found[0].parameters())
    assert SDTP().for_model(model_of(seed=1)).heads is not found[0]


def test_a_policy_without_heads_prunes_with_those_that_ship(folder):
    """On first use, through a cache; options hold as they do with heads that are given."""
    model, kept = kvprune.attach(model_of()), []
    ours = SDTPHeads.from_pretrained(folder / "ours").float()
    for heads in (None, ours):
        cache = kvprune.ComposedCache([SDTP(heads, 0.5, min_tokens=6, local=2)])
        with torch.no_grad():
            model(prompt(1, 40), past_key_values=cache)
        kept.append([cache.columns(layer)[0, 0].tolist() for layer in range(LAYERS)])
    assert kept[0] == kept[1] and [len(c) for c in kept[0]] == [40, 20, 20, 10]


@pytest.mark.parametrize("there", ["others", "none", "no folder"])
def test_a_model_that_no_heads_ship_for(there, folder, monkeypatch):
    """The error names the model, what there is, and the command that trains heads."""
    if there != "others":
        monkeypatch.setattr(shipped, "FOLDER", folder / "empty")
    if there == "none":
        (folder / "empty").mkdir()
    model = model_of(seed=2)
    model.config._name_or_path = "someone/tiny"
    names = r"\['another', 'ours'\]" if there == "others" else r"\[\]"
    with pytest.raises(KVPruneError, match=rf"{names}.*kvprune train-sdtp --model someone/tiny"):
        SDTP().for_model(model)


def test_finding_heads_draws_no_random_numbers(folder):
    """Or the first sampled text of a process would not be the second."""
    shipped._loaded.cache_clear()
    before = torch.get_rng_state()
    SDTP().for_model(model_of())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_demo_model_has_heads(dtype):
    """Whatever it is loaded as; they prune 65 % of a prompt at the end, in 2 MB."""
    model: Any = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=dtype)
    cache = kvprune.ComposedCache([SDTP()])
    with torch.no_grad():
        kvprune.attach(model)(torch.arange(1000)[None], past_key_values=cache, logits_to_keep=1)
    assert cache.columns(29).shape[-1] == 350
    files = list((shipped.FOLDER / "SmolLM2-135M-Instruct").iterdir())
    assert sum(f.stat().st_size for f in files) < 2e6
