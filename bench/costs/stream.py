"""Measures how costs grow with a stream that is read in chunks at a fixed budget."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from transformers import Cache

from .candidates import (
    HEAVY,
    HEAVY_INSIDE,
    STREAMING,
    STREAMING_INSIDE,
    held,
    random_prompt,
    streams,
)
from .clock import Clock, Tick, tidy, turns
from .decode import WARM_UP, step
from .models import Pair
from .plan import CHUNK, STEPS, Part, lengths_of

READ = (STREAMING, HEAVY, STREAMING_INSIDE, HEAVY_INSIDE)
ORIGINAL = {STREAMING_INSIDE: STREAMING, HEAVY_INSIDE: HEAVY}
"""The same policy with original positions, for each policy with positions inside the cache."""


@torch.no_grad()
def measure(pair: Pair, part: Part, clock: Clock, tick: Tick) -> dict[str, Any]:
    """Seconds of each `chunk`, and at some `lengths` `step`s and bytes `held`, by candidate.

    One stream passes all lengths; a copy of the cache is put aside at each, and steps are taken
    on the copies in turns. `step` is by turn, a number for each length.
    """
    model, reading = pair.attached, 0.8
    lengths, (budget,) = lengths_of(part.context), part.budgets
    ids, runs = random_prompt(model, 1, lengths[-1]), streams(budget)
    rows: dict[str, dict[str, Any]] = {name: {"chunk": [], "step": []} for name in READ}
    aside: dict[str, dict[int, Cache]] = {name: {} for name in READ}
    caches = {name: runs[name]() for name in READ}
    # A chunk each warms up.
    for name in READ:
        model(ids[:, :CHUNK], past_key_values=runs[name](), logits_to_keep=1)
    for end in range(CHUNK, lengths[-1] + 1, CHUNK):
        for name in turns(READ, end // CHUNK):
            given = {"past_key_values": caches[name], "logits_to_keep": 1}
            work = partial(model, ids[:, end - CHUNK : end], **given)
            rows[name]["chunk"].append(clock.seconds(work))
            if end in lengths:
                aside[name][end] = copy.deepcopy(caches[name])
        tick(reading * end / lengths[-1])
    _steps(model, aside, part, clock, rows, lambda share: tick(reading + (1 - reading) * share))
    return {"lengths": lengths, "rows": rows}


def _steps(
    model: Any,
    aside: dict[str, dict[int, Cache]],
    part: Part,
    clock: Clock,
    rows: dict[str, dict[str, Any]],
    tick: Tick,
) -> None:
    ids = random_prompt(model, 1, 1)
    keys = [(name, length) for name in aside for length in aside[name]]
    count = part.repeats * STEPS
    tidy()
    for turn in range(WARM_UP + count):
        found = {key: step(model, ids, aside[key[0]][key[1]], clock) for key in turns(keys, turn)}
        if turn >= WARM_UP:
            for name in aside:
                rows[name]["step"].append([found[name, length] for length in aside[name]])
        tick((turn + 1) / (WARM_UP + count))
    for name in aside:
        rows[name]["held"] = [held(cache) for cache in aside[name].values()]
