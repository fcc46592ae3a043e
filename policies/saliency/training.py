"""Trains heads for Saliency: they learn what the queries of completions look at.

Prompts are read once by the frozen model (see `reading`). Heads then learn, with a listwise loss
over all slots of all layers and heads, which slots a completion would miss.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvprune.cache.composed import ComposedCache
from kvprune.errors import KVPruneError
from kvprune.files import make_folder, write_text, write_whole
from kvprune.models.structure import base_of, unwrapped
from kvprune.policy import TokenPolicy
from kvprune.policy.checks import checked
from kvprune.policy.composition import leaves

from ..random import Random
from ..sdtp.examples import Example, sharing
from ..sdtp.shipped import fingerprint, weights_digest
from .features import GROUPS, NEAR, QUERIES
from .heads import SaliencyHeads
from .policy import Saliency
from .reading import Reader, Seen

ACCOUNT = "saliency.json"
SEEN = "saliency-examples"
SHARES = (0.25, 0.125)
"""Of a prompt's slots, for which trained heads are measured."""

_ALIKE = 128
"""Examples whose first so many tokens are the same share a beginning."""

Report = Callable[[str, float], None]


def train_saliency(
    model: Any,
    examples: Sequence[Example],
    out: str | Path,
    *,
    pruning: Sequence[TokenPolicy] = (),
    width: int = 128,
    epochs: int = 4,
    rate: float = 2e-3,
    batch: int = 4,
    held_out: int = 24,
    seed: int = 0,
    report: Report | None = None,
) -> SaliencyHeads:
    """Trains heads for a model, which stays as it is.

    A training that was killed goes on there, if it is called again with the same arguments: with
    the example that it read, or the epoch that it learned. Heads are written before they are
    measured.

    Args:
        model: attached.
        examples: prompts with completions; see `read_examples`. Where those that share a long
            beginning stand one after the other, it is read once.
        out: a folder for the heads and `saliency.json`, what was measured; SDTP's heads may be
            there as well.
        pruning: policies that rank hidden states, as `[SDTP()]`, behind which every second example
            is read, so that heads are good with and without them.
        width: see `SaliencyHeads`.
        epochs: how often heads learn from each example.
        rate: the highest learning rate of AdamW, which rises for a tenth of the steps, and falls.
        batch: examples of a step.
        held_out: how many examples, the last ones, are measured by, and not learned from.
        seed: of the first weights and of the order.
        report: is called with a stage and how much of it is done, from 0 to 1.

    Returns:
        the heads, on the model's device.

    Raises:
        KVPruneError: a number below 1, policies that evict, too few examples, prompts no longer
            than what Saliency protects, no completions, a model without layers that see
            everything, or whose queries cannot be observed, a loss that is not finite, or a folder
            that cannot be written.
    """
    told = report or (lambda stage, done: None)
    _check_numbers(width=width, epochs=epochs, batch=batch, held_out=held_out)
    if any(policy.evicts for policy in leaves(checked(pruning))):
        raise KVPruneError(
            f"train_saliency: pruning={list(pruning)!r}: expected policies that prune hidden "
            f"states alone, as [SDTP()], and none that evicts"
        )
    _check_examples(examples, held_out, Saliency().protected)
    place, home = Path(out), model.device
    base = base_of(unwrapped(model))
    folder = place / SEEN
    make_folder(folder)
    learned = [
        example
        for _, group in groupby(examples[: len(examples) - held_out], lambda e: e.prompt[:_ALIKE])
        for example in sharing(list(group))
    ]
    dense = Reader(model, folder, (), QUERIES, NEAR)
    pruned = replace(dense, pruning=tuple(pruning)) if pruning else dense
    files = []
    for number, example in enumerate(learned):
        files.append((pruned if number % 2 else dense).of(example))
        told("reading", (number + 1) / len(learned))
    draw = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = SaliencyHeads(
            _shape(Seen.load(files[0]), base), width, fingerprint=fingerprint(base)
        )
    heads.to(home)
    policy = Saliency(heads=heads)
    some = [Seen.load(path) for path in draw.sample(files, min(100, len(files)))]
    heads.standardise(
        {n: torch.cat([seen.features[n] for seen in some], -1).float() for n in some[0].features},
        torch.cat([seen.places for seen in some], -1),
    )
    _learn(heads, policy, files, epochs, rate, batch, draw, folder, told)
    heads.eval().requires_grad_(False)
    # It tells of other heads, until these are measured.
    (place / ACCOUNT).unlink(missing_ok=True)
    heads.save(place)
    # Those that Saliency evicts from, so that chance has as many bytes.
    layers = sorted(some[0].wanted)
    measured = _measured(model, examples[len(examples) - held_out :], policy, layers, told)
    account = {"examples": len(learned), "pruning": repr(list(pruning)), "epochs": epochs}
    write_text(place / ACCOUNT, json.dumps({**account, **measured}, indent=2) + "\n")
    shutil.rmtree(folder)
    return heads


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise KVPruneError(
                f"train_saliency: {name}={number!r}: expected a whole number of at least 1"
            )


def _shape(seen: Seen, base: Any) -> list[tuple[int, int]]:
    """For each layer its key/value heads, and the query heads of one; (1, 1) where it has no slots.

    Raises:
        KVPruneError: all layers hold what is in a window alone.
    """
    if not seen.wanted:
        raise KVPruneError(
            f"train_saliency: all layers of {type(base).__name__} hold what is in a window alone, "
            f"so that there is nothing to evict: expected a model with layers that see everything"
        )
    count = base.config.get_text_config(decoder=True).num_hidden_layers
    sizes = {layer: tuple(features.shape[:2]) for layer, features in seen.features.items()}
    found = (sizes.get(layer, (1, GROUPS + 1)) for layer in range(count))
    return [(heads, (size - 1) // GROUPS) for heads, size in found]


def _check_examples(examples: Sequence[Example], held_out: int, protected: int) -> None:
    if len(examples) <= held_out:
        raise KVPruneError(
            f"train_saliency: expected more examples than the {held_out} that are held out, got "
            f"{len(examples)}"
        )
    short = [e for e in examples if len(e.prompt) <= protected + 1 or not e.completion]
    if short:
        raise KVPruneError(
            f"train_saliency: expected prompts of more than {protected + 1} tokens (as many are "
            f"protected) with completions, got {len(short)} of {len(examples)} without, the first "
            f"of {len(short[0].prompt)} + {len(short[0].completion)} tokens"
        )


@torch.enable_grad()
def _learn(
    heads: SaliencyHeads,
    policy: Saliency,
    files: Sequence[Path],
    epochs: int,
    rate: float,
    batch: int,
    draw: random.Random,
    folder: Path,
    told: Report,
) -> None:
    """All epochs, or those that are left of a training that was killed; see `folder`."""
    batch = min(batch, len(files))
    steps = epochs * (len(files) // batch)
    optimizer = torch.optim.AdamW(heads.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps + 1, pct_start=0.1)
    names = sorted(path.name for path in files)
    asked = repr((weights_digest(heads), repr(policy), names, epochs, rate, batch))
    reached = folder / f"learned-{hashlib.sha256(asked.encode()).hexdigest()[:32]}.pt"
    begun = 0
    if reached.exists():
        before = torch.load(reached, map_location=heads.place_mean.device, weights_only=True)
        begun = before["epochs"]
        heads.load_state_dict(before["heads"])
        optimizer.load_state_dict(before["optimizer"])
        schedule.load_state_dict(before["schedule"])
        draw.setstate(before["draw"])
    done = begun * (len(files) // batch)
    for epoch in range(begun, epochs):
        order = draw.sample(list(files), len(files))
        for start in range(0, len(order) - batch + 1, batch):
            for path in order[start : start + batch]:
                loss = _loss(heads, Seen.load(path), policy.sinks, policy.protected - policy.sinks)
                if not bool(loss.isfinite()):
                    raise KVPruneError(
                        f"train_saliency: a loss of {float(loss)}: expected numbers. Load the "
                        f"model in float32, or lower the rate"
                    )
                (loss / batch).backward()
            torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done += 1
            told("learning", done / steps)
        state = {
            "epochs": epoch + 1,
            "heads": heads.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "draw": draw.getstate(),
        }
        write_whole(reached, partial(torch.save, state))


def _loss(heads: SaliencyHeads, seen: Seen, sinks: int, recent: int) -> Tensor:
    """The cross-entropy of scores against what completions look at, over all free slots."""
    home, count = heads.place_mean.device, seen.places.shape[-1]
    layers = (
        (number, features[None].float().to(home), seen.columns[number][None, None].to(home))
        for number, features in seen.features.items()
    )
    there = torch.zeros(1, count, dtype=torch.bool, device=home)
    for columns in seen.columns.values():
        there[0, columns.to(home)] = True
    scores = heads(layers, seen.places[None].to(home), there)
    said, wanted = [], []
    for score, (number, columns) in zip(scores, seen.columns.items(), strict=True):
        if number in seen.wanted:
            free = (columns >= sinks) & (columns < count - recent)
            said.append(score[0, :, free.to(home)].flatten())
            wanted.append(seen.wanted[number][:, free].flatten().float().to(home))
    target = torch.cat(wanted).softmax(0)
    return -(target * torch.cat(said).log_softmax(0)).sum()


@torch.no_grad()
def _measured(
    model: Any, examples: Sequence[Example], policy: Saliency, layers: list[int], told: Report
) -> dict[str, Any]:
    """Nats a token of completions: dense, with these heads, and with slots kept at random."""
    runs: dict[str, TokenPolicy | None] = {"dense": None}
    for share in SHARES:
        runs[f"saliency {share}"] = policy.with_budget(share)
        runs[f"random {share}"] = Random(share, when="first", layers=layers)
    lost: dict[str, list[float]] = {name: [] for name in runs}
    for number, example in enumerate(examples):
        for name, one in runs.items():
            lost[name].append(_nats(model, example, one))
        told("measuring", (number + 1) / len(examples))
    means = {name: sum(each) / len(each) for name, each in lost.items()}
    return {
        "held_out": len(examples),
        "prompt_tokens": sum(len(example.prompt) for example in examples) / len(examples),
        "shares": list(SHARES),
        "nats": {name: round(mean, 4) for name, mean in means.items()},
        "each": {name: [round(nats, 4) for nats in each] for name, each in lost.items()},
    }


def _nats(model: Any, example: Example, policy: TokenPolicy | None) -> float:
    """The loss of a completion's tokens, each behind what the policy left of the prompt."""
    cache = ComposedCache([] if policy is None else [policy])
    whole = torch.tensor([example.prompt + example.completion], device=model.device)
    lead = len(example.prompt) - 1
    model(whole[:, :lead], past_key_values=cache, logits_to_keep=1)
    said = model(whole[:, lead:-1], past_key_values=cache).logits[0].float()
    return float(torch.nn.functional.cross_entropy(said, whole[0, lead + 1 :]))
