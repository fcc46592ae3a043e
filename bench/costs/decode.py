"""Steps at a full budget after a prompt, beside dense steps after as many tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

import kvprune
from kvprune.statistics import Attention

from .candidates import (
    BOTH,
    DENSE,
    HEAVY,
    ROUND,
    STREAMING,
    held,
    in_decoding,
    policies,
    random_prompt,
)
from .clock import Clock, Tick, tidy, turns
from .models import Pair
from .plan import STEPS, Part

BUDGETED = (STREAMING, HEAVY, BOTH)
WARM_UP = 5
"""Steps of every candidate that are not counted."""
READING = 0.7
"""The share of the time in which the prompt is read."""


@torch.no_grad()
def measure(pair: Pair, part: Part, clock: Clock, tick: Tick) -> dict[str, Any]:
    """The seconds of each `step`, and the bytes `held` afterwards, by budget and candidate."""
    ids = random_prompt(pair.attached, 1, part.context)
    caches = _read(pair.attached, ids, part.budgets, lambda share: tick(READING * share))
    return _stepped(pair.attached, ids, part, caches, clock, tick)


@torch.no_grad()
def measure_field(pair: Pair, part: Part, clock: Clock, tick: Tick) -> dict[str, Any]:
    """As `measure`, of the field's methods; each reads the prompt, and keeps its budget of it.

    Also the mean of the steps of each `round`, from one seldom eviction to the next.
    """
    model = pair.attached
    ids = random_prompt(model, 1, part.context)
    caches: dict[int, dict[str, Cache]] = {budget: {} for budget in part.budgets}
    for budget, found in caches.items():
        makers = in_decoding(model, budget)
        for number, (name, make) in enumerate(makers.items(), 1):
            found[name] = make()
            shown = ids[:, :budget] if name == DENSE else ids
            model(shown, past_key_values=found[name], logits_to_keep=1)
            tick(READING * number / len(makers))
    said = _stepped(model, ids, part, caches, clock, tick)
    for row in (row for rows in said.values() for row in rows.values()):
        steps = row["step"]
        # A short trial has no whole round.
        size = min(ROUND, len(steps))
        row["round"] = [
            sum(steps[i : i + size]) / size for i in range(0, len(steps) - size + 1, size)
        ]
    return said


def _stepped(
    model: Any,
    ids: Tensor,
    part: Part,
    caches: dict[int, dict[str, Cache]],
    clock: Clock,
    tick: Tick,
) -> dict[str, Any]:
    """The steps of all caches, in turns."""
    names = [(budget, name) for budget in part.budgets for name in caches[budget]]
    steps: dict[tuple[int, str], list[float]] = {key: [] for key in names}
    tidy()
    count = part.repeats * STEPS
    for turn in range(WARM_UP + count):
        for key in turns(names, turn):
            steps[key].append(step(model, ids, caches[key[0]][key[1]], clock))
        tick(READING + (1 - READING) * (turn + 1) / (WARM_UP + count))
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
