"""Training gates on KVzip+: texts are read twice, and gates learn the logarithm of its scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.cache.composed import ComposedCache
from kvprune.errors import KVPruneError
from kvprune.models.structure import base_of, decoder_layers, unwrapped
from kvprune.wiring.read import read

from ..duoattention.scores import architecture
from ..kvzip import KVzip
from .gates import KVzapGates
from .policy import NORM

LEAST = 1e-12
"""A score below this counts as this: its logarithm is finite."""


@dataclass(frozen=True)
class Trained:
    """Gates, and how well they tell KVzip+'s scores of texts that they did not learn from.

    explained: by layer, the part of the variance of the logarithms that they explain (R squared),
        a mean over the heads; 1 is all.
    """

    gates: KVzapGates
    explained: tuple[float, ...]


def train_gates(
    model: Any,
    texts: Sequence[Tensor],
    tokenizer: Any = None,
    *,
    hidden: int | None = 512,
    tokens: int = 300,
    epochs: int = 15,
    rate: float = 5e-3,
    batch: int = 512,
    held_out: float = 0.1,
    seed: int = 0,
    report: Callable[[str, float], None] | None = None,
) -> Trained:
    """Trains gates for a model.

    Args:
        model: attached, with `input_layernorm` in its layers.
        texts: ids `[1, n]` each, without padding; two at least.
        tokenizer: the model's, for the words that ask for the second reading; None for none.
        hidden: see `KVzapGates`; None for linear gates.
        tokens: how many tokens of each text are learned from, drawn at random.
        epochs: how often all of them are.
        rate: the learning rate of AdamW, which falls to 0 by a cosine.
        batch: tokens of a step.
        held_out: the share of texts that nothing is learned from, for `explained`.
        seed: of the draws.
        report: is called with a stage and how much of it is done, from 0 to 1.

    Raises:
        KVPruneError: a model that cannot be read twice or has no such norms, too few texts, or a
            loss that is not finite.

    Sources: KVzap (arXiv 2601.07891): layer inputs, MLPs of 512, AdamW with 5e-3, 15 epochs of
    batches of 512, a mean squared error on the logarithm of KVzip+'s scores.
    """
    if len(texts) < 2:
        raise KVPruneError(
            f"train_gates: expected two texts at least, one of them to test with, got {len(texts)}"
        )
    told = report or (lambda stage, done: None)
    draw = torch.Generator().manual_seed(seed)
    seen = []
    for number, ids in enumerate(texts):
        seen.append(_examples(model, ids, tokenizer, tokens, draw))
        told("reading texts twice", (number + 1) / len(texts))
    tests = min(max(1, round(held_out * len(texts))), len(texts) - 1)
    facts = architecture(base_of(unwrapped(model)))
    layers, heads = facts["num_hidden_layers"], facts["num_key_value_heads"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gates = KVzapGates(layers, facts["hidden_size"], heads, hidden, facts)
    explained = []
    for layer in range(layers):
        states, wanted = (
            [torch.cat([one[layer][part] for one in some]).float() for some in _split(seen, tests)]
            for part in (0, 1)
        )
        gate = gates.layers[layer]
        with torch.enable_grad():
            _fit(gate, states[0], wanted[0], epochs, rate, batch, draw)
        with torch.no_grad():
            explained.append(_explained(gate(states[1]), wanted[1]))
        told("training", (layer + 1) / layers)
    return Trained(gates.eval().requires_grad_(False), tuple(explained))


def _split(seen: list[Any], tests: int) -> tuple[list[Any], list[Any]]:
    """Those to learn from, and those to test with."""
    return seen[:-tests], seen[-tests:]


@torch.no_grad()
def _examples(
    model: Any, ids: Tensor, tokenizer: Any, tokens: int, draw: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """By layer, states `[n, C]` of some tokens of a text, and the logarithms of their scores.

    Of layers whose queries see a window, those of the tokens in it; scores are `[n, Hkv]`.
    """
    policy: Any = KVzip(1.0, plus=True)
    policy = policy if tokenizer is None else policy.for_tokenizer(tokenizer)
    (reading,) = policy.statistics
    norms = [getattr(each, NORM, None) for each in decoder_layers(base_of(unwrapped(model)))]
    if not all(isinstance(norm, nn.Module) for norm in norms):
        raise KVPruneError(
            f"train_gates: {type(model).__name__} has layers without {NORM}: expected a model of "
            f"another family"
        )
    states: dict[int, Tensor] = {}
    chosen = torch.randperm(ids.shape[1], generator=draw)[:tokens]

    def keep(layer: int) -> Any:
        def note(_: nn.Module, __: Any, output: Tensor) -> None:
            # Of the first reading; in half the bytes, as there are many.
            if layer not in states:
                states[layer] = output[0, chosen.to(output.device)].to("cpu", torch.float16)

        return note

    cache = ComposedCache([policy])
    hooks = [norm.register_forward_hook(keep(i)) for i, norm in enumerate(norms)]  # type: ignore[union-attr]
    try:
        read(model, cache, ids)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for index, layer in cache.slot_layers():
        # Nothing was evicted, so that all heads hold the same.
        place = {column: i for i, column in enumerate(layer.columns[0, 0].tolist())}
        there = [i for i, column in enumerate(chosen.tolist()) if column in place]
        at = [place[int(chosen[i])] for i in there]
        scores = layer.statistics[reading][0].cpu().float()[:, at]
        found.append((states[index][there], scores.clamp(min=LEAST).log().T))
    return found


def _fit(
    gate: nn.Module,
    states: Tensor,
    wanted: Tensor,
    epochs: int,
    rate: float,
    batch: int,
    draw: torch.Generator,
) -> None:
    """Fits one layer's gate: by least squares where it is linear, else step by step."""
    if isinstance(gate, nn.Linear):
        ones = torch.cat([states, torch.ones_like(states[:, :1])], 1).double()
        # A little of the ridge, so that few texts are enough.
        square = ones.T @ ones + 1e-3 * len(ones) * torch.eye(ones.shape[1], dtype=ones.dtype)
        found = torch.linalg.solve(square, ones.T @ wanted.double()).to(states.dtype)
        with torch.no_grad():
            gate.weight.copy_(found[:-1].T)
            gate.bias.copy_(found[-1])
        return
    middle = wanted.mean(0)
    last = gate[-1]  # type: ignore[index]
    with torch.no_grad():
        last.bias.copy_(middle)
    steps = epochs * -(-len(states) // batch)
    optimizer = torch.optim.AdamW(gate.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for some in torch.randperm(len(states), generator=draw).split(batch):
            loss = (gate(states[some]) - wanted[some]).square().mean()
            if not bool(loss.isfinite()):
                raise KVPruneError(
                    f"train_gates: a loss of {float(loss)}: expected numbers. Lower the rate"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _explained(said: Tensor, wanted: Tensor) -> float:
    """The part of the variance that is explained, a mean over heads; `[n, Hkv]` both."""
    rest = (said - wanted).square().sum(0)
    whole = (wanted - wanted.mean(0)).square().sum(0).clamp(min=LEAST)
    return float((1 - rest / whole).mean())
