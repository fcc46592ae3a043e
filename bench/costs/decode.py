"""Steps at a full budget after a long prompt, beside dense steps after as many tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

import kvprune
from kvprune.statistics import Attention

from .candidates import BOTH, DENSE, HEAVY, STREAMING, held, policies, random_prompt
from .clock import Clock, Tick, tidy, turns
from .models import Pair
from .plan import STEPS, Part

BUDGETED = (STREAMING, HEAVY, BOTH)
WARM_UP = 5
"""Steps of every candidate that are not counted."""


@torch.no_grad()
def measure(pair: Pair, part: Part, clock: Clock, tick: Tick) -> dict[str, Any]:
    """The seconds of each `step`, and the bytes `held` afterwards, by budget and candidate."""
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
    """The seconds to read one token, which is then taken back from a dense cache."""
    seconds = clock.seconds(lambda: model(ids[:, :1], past_key_values=cache))
    if isinstance(cache, DynamicCache):
        cache.crop(-1)
    return seconds


def _read(
    model: Any, ids: Tensor, budgets: tuple[int, ...], tick: Tick
) -> dict[int, dict[str, Cache]]:
    """The caches of each budget and candidate, after the prompt.

    Each candidate reads the prompt once, with nothing evicted; the caches of all budgets are made
    from that reading. Dense reads as many tokens as the budget.
    """
    found: dict[int, dict[str, Cache]] = {budget: {} for budget in budgets}
    for budget in budgets:
        found[budget][DENSE] = DynamicCache(config=model.config)
        model(ids[:, :budget], past_key_values=found[budget][DENSE], logits_to_keep=1)
    for number, name in enumerate(BUDGETED, 1):
        *pruners, _ = policies(model, max(budgets))[name]
        whole = kvprune.ComposedCache(pruners, observe=(Attention(),))
        model(ids, past_key_values=whole, logits_to_keep=1)
        for budget in budgets:
            evicts = policies(model, budget)[name][-1]
            found[budget][name] = whole.with_policies([*pruners, evicts], model)
        tick(number / len(BUDGETED))
    return found
