"""The pruning pass of training against what pruning really does, through a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kvprune
from kvprune.policies import SDTP
from kvprune.policies.sdtp import simulation
from kvprune.policies.sdtp.simulation import PruningPass, simulated

from ..support.models import LAYERS, fresh_model, prompt, tiny_model
from ..support.strategies import sdtp_heads

FAMILIES = ["llama", "qwen3", "mistral-window", "gpt_neox"]
PROMPT, COMPLETION = 40, 5
IDS = prompt(1, PROMPT + COMPLETION)


def pruner(keep: float = 0.6, asking: int = 0, **options: Any) -> SDTP:
    """Two stages, before layers 1 and 3; with `asking` newest tokens in a low-rank term."""
    heads = sdtp_heads(query_heads=2 * bool(asking), query_size=3, query_tokens=asking or 1)
    return SDTP(heads, keep, **{"min_tokens": 6, **options})


def really(family: str, policy: SDTP, model: Any = None) -> tuple[Tensor, list[list[int]]]:
    """Logits from the last prompt token on, and the prompt's columns that enter each layer."""
    model, cache = model or tiny_model(family), kvprune.ComposedCache([policy])
    logits, entered = [], list[list[int]]()

    def note(*_: Any) -> None:
        entered.append(cache.step.columns[0].tolist())

    handles = [layer.register_forward_pre_hook(note) for layer in model.base_model.layers]
    with torch.no_grad():
        for ids in IDS.split([PROMPT] + [1] * COMPLETION, dim=1):
            logits.append(model(ids, past_key_values=cache, logits_to_keep=1).logits[0])
    for handle in handles:
        handle.remove()
    return torch.cat(logits), entered[:LAYERS]


def supposedly(
    family: str, policy: SDTP, temperature: float = 0.0, seed: int = 0, model: Any = None
) -> tuple[Tensor, PruningPass]:
    """The same by simulation."""
    generator = torch.Generator().manual_seed(seed)
    run = PruningPass(policy, PROMPT, temperature, generator)
    model = model or tiny_model(family)
    with simulated(model, run):
        logits = model(IDS, use_cache=False, logits_to_keep=COMPLETION + 1).logits[0]
    return logits, run


def went_on(run: PruningPass) -> list[list[int]]:
    """By stage, the columns of the tokens that it kept."""
    return [c[k].tolist() for c, k in zip(run.columns, run.kept, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"asking": 7}, {"keep": 0.3, "local": 3, "sinks": 0}, {"keep": 1.0}, {"min_tokens": 41}],
    ids=str,
)
def test_without_noise_it_keeps_what_pruning_keeps(family, options):
    """At each stage the same columns; also where the schedule keeps everything."""
    policy = pruner(**options)
    _, held = really(family, policy)
    _, run = supposedly(family, policy)
    assert went_on(run) == [held[1], held[3]]
    assert (len(held[3]) < PROMPT) == (options not in ({"keep": 1.0}, {"min_tokens": 41}))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_pruning_without_the_leak(family, monkeypatch):
    """To rounding, where a dropped token weighs next to nothing; the dense ones are far off."""
    policy = pruner(asking=3)
    expected, _ = really(family, policy)
    monkeypatch.setattr(simulation, "LEAK", 1e-30)
    found, _ = supposedly(family, policy)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    dense = tiny_model(family)(IDS, logits_to_keep=COMPLETION + 1).logits[0]
    assert (dense - expected).abs().max().item() > 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_pruning_but_for_the_leak(family):
    """With weights so small that attention is nearly even, so that what leaks can be told.

    At most 26 of 40 dropped tokens weigh 1e-5 each against the 14 or more that stay: a share of
    2e-5 per layer, of values that differ by a few logits' standard deviations.
    """
    policy, model = pruner(asking=3), tiny_model(family, initializer_range=0.05)
    expected, _ = really(family, policy, model)
    found, _ = supposedly(family, policy, model=model)
    dense = model(IDS, logits_to_keep=COMPLETION + 1).logits[0]
    scale = expected.std().item()
    assert (found - expected).abs().max().item() < 1e-3 * scale
    assert (dense - expected).abs().max().item() > 1e-2 * scale


def test_the_last_token_of_the_prompt_stays():
    """Its logits are asked for; with `local=0` that alone protects it, as in inference."""
    policy = pruner(0.3, local=0)
    _, held = really("llama", policy)
    _, run = supposedly("llama", policy)
    assert went_on(run) == [held[1], held[3]]
    assert PROMPT - 1 in held[3]


@pytest.mark.parametrize("options", [{"stages": 1}, {"layers": (1,)}], ids=str)
def test_stages_that_the_policy_leaves_out_are_left_out(options):
    """`stages` and `layers` of the policy count in the simulation, too."""
    policy = pruner(**options)
    _, held = really("llama", policy)
    assert held[1] == held[3]
    _, run = supposedly("llama", policy)
    assert went_on(run) == [held[1]]


def test_noise_changes_what_is_kept_and_not_how_much():
    """A generator with the same seed draws the same noise; protected tokens stay."""
    policy = pruner(0.5, sinks=3, local=4)
    kept = [went_on(supposedly("llama", policy, 5.0, seed)[1]) for seed in (1, 1, 2)]
    assert kept[0] == kept[1] and kept[0][0] != kept[2][0]
    for first, second in kept:
        assert [len(first), len(second)] == [20, 10]
        assert {0, 1, 2, 36, 37, 38, 39} <= set(second) <= set(first)


def loss_of(logits: Tensor) -> Tensor:
    """Cross-entropy of the completion."""
    return F.cross_entropy(logits[:-1], IDS[0, PROMPT:])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_weight_of_every_head(family, temperature):
    """And none of a model whose weights want none."""
    model = kvprune.attach(fresh_model(family)).requires_grad_(False)
    policy = pruner(asking=7)
    logits, _ = supposedly(family, policy, temperature, model=model)
    loss_of(logits).backward()
    assert policy.heads is not None
    silent = [n for n, p in policy.heads.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_dropped_tokens_learn_as_well_as_kept_ones(temperature):
    """Each token's score has a gradient at each stage that it reaches, but for protected ones."""
    policy, scores = pruner(0.5, sinks=3, local=4), []
    assert policy.heads is not None
    policy.heads.register_forward_hook(lambda m, a, score: scores.append(score))
    logits, run = supposedly("llama", policy, temperature)
    gradients = torch.autograd.grad(loss_of(logits), scores)
    for gradient, columns, kept in zip(gradients, run.columns, run.kept, strict=True):
        free = (columns >= 3) & (columns < PROMPT - 4)
        assert int((~kept).sum()) >= 10
        assert bool((gradient[0, free] != 0).all()) and not gradient[0, ~free].any()


def test_a_head_gets_no_gradient_through_the_states_that_it_reads():
    """A later stage's scores do not depend on an earlier head but through who is dropped."""
    policy = pruner()
    _, run = supposedly("llama", policy)
    heads: Any = policy.heads
    found = torch.autograd.grad(
        run.scores[1].sum(), list(heads.stages[0].parameters()), allow_unused=True
    )
    assert all(gradient is None for gradient in found)


def test_tokens_behind_the_prompt_are_never_hidden():
    """From the stage that drops a token on, its column of the mask is the leak; all others 0."""
    policy, model, masks = pruner(0.4), tiny_model(), []
    run = PruningPass(policy, PROMPT, 0.0)
    layers = list(model.base_model.layers)
    with simulated(model, run):
        handles = [
            x.register_forward_pre_hook(
                lambda m, a, k: masks.append(k["attention_mask"]), with_kwargs=True
            )
            for x in layers
        ]
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    first, second = went_on(run)
    leak = torch.tensor(simulation.LEAK).double().log()
    for mask, kept in zip(masks[1:], (first, first, second), strict=True):
        last = mask[0, 0, -1].detach()
        expected = leak.repeat(PROMPT + COMPLETION).index_fill(0, torch.tensor(kept), 0.0)
        expected[PROMPT:] = 0.0
        torch.testing.assert_close(last, expected, rtol=1e-9, atol=2 * simulation.LEAK)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_gone_afterwards(fails):
    """Also after an error inside."""
    model = tiny_model()
    before = [list(m._forward_pre_hooks) for m in model.modules()]
    expected = model(IDS, use_cache=False).logits
    try:
        with simulated(model, PruningPass(pruner(0.2), PROMPT, 0.0)):
            assert not torch.equal(model(IDS, use_cache=False).logits, expected)
            assert not fails or 1 // 0
    except ZeroDivisionError:
        pass
    assert before == [list(m._forward_pre_hooks) for m in model.modules()]
    assert torch.equal(model(IDS, use_cache=False).logits, expected)
