"""Measures reading a prompt: seconds, bytes and FLOPs of every candidate, and a step after it."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from kvprune.evaluation.measure.flops import Flops

from .candidates import Make, candidates, methods, random_prompt
from .clock import Clock, Tick, tidy, turns
from .count import counted
from .models import Pair
from .plan import STEPS, Part

WARM_UP_STEPS = 3


@torch.no_grad()
def measure(pair: Pair, part: Part, clock: Clock, tick: Tick) -> dict[str, Any]:
    """`prefill` and `step`, seconds in each turn, and the numbers of `counted`, by candidate.

    Counting is a run of its own, before any that is timed, and warms up. A step is the median of
    some, on what the cache holds after the prompt.
    """
    model, (budget,) = pair.attached, part.budgets
    ids = random_prompt(model, part.rows, part.context)
    runs = methods(model) if part.kind == "field" else candidates(model, budget)
    flops, done = Flops.measured(model), 0
    rows: dict[str, dict[str, Any]] = {}
    for turn in range(part.repeats + 1):
        for name in turns(list(runs), max(turn - 1, 0)):
            if turn == 0:
                said = counted(model, ids, runs[name], flops, clock)
                rows[name] = {"prefill": [], "step": [], **said}
            else:
                for what, seconds in timed(model, ids, runs[name], clock).items():
                    rows[name][what].append(seconds)
            done += 1
            tick(done / (part.repeats + 1) / len(runs))
    return rows


def timed(model: Any, ids: Tensor, make: Make, clock: Clock) -> dict[str, float]:
    """The seconds of one prefill, and of a step after it."""
    tidy()
    cache = make()
    prefill = clock.seconds(lambda: model(ids, past_key_values=cache, logits_to_keep=1))
    step = [
        clock.seconds(lambda: model(ids[:, :1], past_key_values=cache))
        for _ in range(STEPS + WARM_UP_STEPS)
    ]
    return {"prefill": prefill, "step": statistics.median(step[WARM_UP_STEPS:])}
