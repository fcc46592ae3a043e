"""Steps at a full budget after a long prompt, beside dense steps at a context of as many tokens."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

import kvprune

from .candidates import BOTH, DENSE, HEAVY, STREAMING, held, policies, random_prompt
from .clock import Clock, Tick, tidy, turns
from .models import Pair
from .plan import STEPS, Part

BUDGETED = (STREAMING, HEAVY, BOTH)
WARM_UP = 5
"""Steps that are not counted, of every candidate."""


@torch.no_grad()
def measure(pair: Pair, part: Part, clock: Clock, tick: Tick) -> dict[str, Any]:
    """By budget and candidate: `step`, seconds of every one, and the bytes `held` after them."""
    model, reading = pair.attached, 0.7
    ids = random_prompt(model, 1, part.context)
    caches = _read(model, ids, part.budgets, lambda share: tick(reading * share))
    names = [(budget, name) for budget in part.budgets for name in caches[budget]]
    steps: dict[tuple[int, str], list[float]] = {key: [] for key in names}
    tidy()
    count = part.repeats * STEPS
    for turn in range(WARM_UP + count):
        for key in turns(names, turn):
            steps[key].append(step(model, ids, caches[key[0]][key[1]], clock))
        tick(reading + (1 - reading) * (turn + 1) / (WARM_UP + count))
    return {
        str(budget): {
            name: {"step": steps[budget, name][WARM_UP:], "held": held(cache)}
            for name, cache in caches[budget].items()
        }
        for budget in part.budgets
    }


def step(model: Any, ids: Tensor, cache: Cache, clock: Clock) -> float:
    """Seconds of one token; a dense cache has as many tokens after it as before."""
    seconds = clock.seconds(lambda: model(ids[:, :1], past_key_values=cache))
    if isinstance(cache, DynamicCache):
        cache.crop(-1)
    return seconds


def _read(
    model: Any, ids: Tensor, budgets: tuple[int, ...], tick: Tick
) -> dict[int, dict[str, Cache]]:
    """Caches by budget and candidate.

    Each policy reads the prompt once, at the largest budget, and is loaded at each: what a
    smaller budget keeps of what the largest one kept is what it would have kept of the prompt,
    since both rank alike. The first step drops the rest.
    """
    found: dict[int, dict[str, Cache]] = {budget: {} for budget in budgets}
    for budget in budgets:
        found[budget][DENSE] = DynamicCache(config=model.config)
        model(ids[:, :budget], past_key_values=found[budget][DENSE], logits_to_keep=1)
    with TemporaryDirectory() as folder:
        for number, name in enumerate(BUDGETED, 1):
            file = Path(folder, f"{number}.safetensors")
            whole = kvprune.ComposedCache(policies(model, max(budgets))[name])
            model(ids, past_key_values=whole, logits_to_keep=1)
            whole.save(file)
            del whole
            for budget in budgets:
                mine = policies(model, budget)[name]
                found[budget][name] = kvprune.ComposedCache.load(file, mine, model)
            tick(number / len(BUDGETED))
    return found
