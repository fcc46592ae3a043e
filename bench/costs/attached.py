"""The cost of `attach` where no cache of kvprune is used."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from .candidates import random_prompt
from .clock import Clock, Tick, tidy, turns
from .decode import WARM_UP, step
from .models import Pair
from .plan import STEPS, Part

WITH, WITHOUT = "attached", "not attached"


@torch.no_grad()
def measure(pair: Pair, part: Part, clock: Clock, tick: Tick) -> dict[str, Any]:
    """The seconds of the model with and without `attach`: `prefill` by turn, and each `step`.

    Both models have the same weights, in the same memory, and a `DynamicCache`.
    """
    models: dict[str, Any] = {WITHOUT: pair.plain, WITH: pair.attached}
    ids = random_prompt(pair.plain, 1, part.context)
    rows: dict[str, dict[str, Any]] = {name: {"prefill": [], "step": []} for name in models}
    for turn in range(part.repeats + 1):
        caches = {name: DynamicCache(config=model.config) for name, model in models.items()}
        for name in turns(list(models), turn):
            tidy()
            given = {"past_key_values": caches[name], "logits_to_keep": 1}
            seconds = clock.seconds(partial(models[name], ids, **given))
            # The first turn warms up.
            rows[name]["prefill"] += [seconds] if turn else []
        for at in range(WARM_UP + STEPS):
            for name in turns(list(models), at):
                seconds = step(models[name], ids, caches[name], clock)
                rows[name]["step"] += [seconds] if turn and at >= WARM_UP else []
        tick((turn + 1) / (part.repeats + 1))
    return rows
