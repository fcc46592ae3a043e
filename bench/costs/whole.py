"""End to end: a prompt and the tokens generated behind it, inside `generate`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .candidates import BOTH, DENSE, candidates, held, random_prompt
from .clock import Clock, Tick, tidy, turns
from .models import Pair
from .plan import Part

WARM_UP = 256


@torch.no_grad()
def measure(pair: Pair, part: Part, clock: Clock, tick: Tick) -> dict[str, Any]:
    """The seconds of `whole` runs, by turn, and the bytes `held` at the end, by candidate."""
    model, (budget,) = pair.attached, part.budgets
    ids, runs = random_prompt(model, 1, part.context), candidates(model, budget)
    rows: dict[str, dict[str, Any]] = {name: {"whole": []} for name in (DENSE, BOTH)}
    for name in rows:
        generate(model, ids[:, :WARM_UP], runs[name](), 2)
    for turn in range(part.repeats):
        for at, name in enumerate(turns(list(rows), turn)):
            tidy()
            cache = runs[name]()
            seconds = clock.seconds(partial(generate, model, ids, cache, part.new))
            rows[name]["whole"].append(seconds)
            rows[name]["held"] = held(cache)
            tick((turn + (at + 1) / len(rows)) / part.repeats)
    return rows


def generate(model: Any, ids: Tensor, cache: Cache, new: int) -> None:
    """Generates exactly `new` tokens, greedily."""
    greedy = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, past_key_values=cache, pad_token_id=0, **greedy)
