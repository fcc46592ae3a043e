"""Measures a decode step where heads or rows keep different numbers of slots.

    python -m bench.layout           # five minutes

Each case is a cache whose heads (or rows) part behind the prompt, beside one in which all keep the
mean of these, so that both hold as many slots. They take turns; a step's time is over that of the
other in the same turn. `bytes` are those that the cache holds over what its slots need: keys,
values and columns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import kvprune
from kvprune import ComposedCache, Ranking
from kvprune.evaluation.data.assets import demo_model

from .about import write
from .costs.candidates import random_prompt

RESULTS = Path(__file__).parent / "results"

CASES: dict[str, list[list[int]]] = {
    "one head of three keeps 1,400 slots, two keep 20": [[1400, 20, 20]],
    "two heads of three keep 900 slots, one keeps 90": [[900, 900, 90]],
    "three heads keep 1,400, 900 and 100 slots": [[1400, 900, 100]],
    "a row keeps 1,000 slots, seven keep 100": [[1000] * 3] + [[100] * 3] * 7,
}
"""The slots of each row, by head."""


@dataclass(frozen=True)
class Newest(kvprune.TokenPolicy):
    """Each row and head keeps so many of its newest slots, once behind the prompt."""

    each: tuple[tuple[int, ...], ...] = ()

    def rank_slots(self, slots: kvprune.policy.SlotView) -> Ranking:
        """See `TokenPolicy.rank_slots`."""
        columns = slots.columns.expand(-1, slots.heads, -1)
        budget = torch.tensor(self.each, device=columns.device)
        return Ranking(columns.double(), torch.zeros_like(columns, dtype=torch.bool), budget)


@torch.no_grad()
def read(model: Any, each: Sequence[Sequence[int]], prompt: int) -> ComposedCache:
    """A cache that has read a random prompt of so many tokens, and kept so many slots."""
    cache = ComposedCache([Newest(tuple(map(tuple, each)), when="prompt")])
    with cache.prompt(prompt):
        model(random_prompt(model, len(each), prompt), past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def row(model: Any, name: str, each: list[list[int]], count: int) -> dict[str, Any]:
    """What a case gives."""
    prompt = max(map(max, each)) + 8
    mean = round(sum(map(sum, each)) / len(each) / len(each[0]))
    caches = [read(model, each, prompt), read(model, [[mean] * len(one) for one in each], prompt)]
    seconds: list[list[float]] = [[], []]
    new = torch.ones(len(each), 1, dtype=torch.long)
    for _ in range(count):
        for cache, mine in zip(caches, seconds, strict=True):
            start = time.perf_counter()
            model(new, past_key_values=cache)
            mine.append(time.perf_counter() - start)
    ratios = sorted(a / b for a, b in zip(*(mine[3:] for mine in seconds), strict=True))
    held, quarter = caches[0].layers[0], len(ratios) // 4
    vectors = sum(t.shape[-1] * t.element_size() for t in held.rectangles[0].held.buffers)
    kept = (held.columns >= 0).sum(-1)
    need = int(kept.expand(-1, held.heads).sum()) * vectors + 8 * int(kept.sum())
    return {
        "case": name,
        "rectangles": len(held.rectangles),
        "ratio": statistics.median(ratios),
        "low": ratios[quarter],
        "high": ratios[-quarter - 1],
        "step_ms": 1000 * statistics.median(seconds[0][3:]),
        "bytes": sum(t.nbytes for t in held.tensors()) / need,
    }


def main() -> None:
    """Measures, and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=43, help="steps of each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "layout.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = kvprune.attach(AutoModelForCausalLM.from_pretrained(demo_model()))
    rows = []
    for name, each in CASES.items():
        rows.append(row(model, name, each, args.count))
        print(rows[-1], flush=True)
        write(args.out, args, model, rows)


if __name__ == "__main__":
    main()
