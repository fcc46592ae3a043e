"""Measures what budgets by head, a second reading and long answers cost, beside dense.

    python -m bench.by_head           # seven minutes of two cores

Prompts are essays. `prefill` is the time to read a prompt of so many tokens, by a policy or twice
by KVzip, over that of the dense model in the same turn. `step` is the mean time of a token over 256
steps, two of R-KV's evictions included, over that of the dense model with as many slots. `bytes`
are those held behind the prompt over the dense ones, with a quarter of the slots.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import kvprune
from kvprune import ComposedCache
from kvprune.evaluation.data.assets import demo_model, ruler_data
from kvprune.policies import RKV, AdaKV, CriticalKV, ExpectedAttention, KVzip, SnapKV

from .about import write
from .costs.candidates import held

RESULTS = Path(__file__).parent / "results"
DENSE = "dense"
SLOTS, STEPS = 1024, 256

Read = Callable[[Tensor], Any]


def readers(model: Any, tokenizer: Any) -> dict[str, Read]:
    """What reads a prompt and returns its cache, by name."""

    def dense(ids: Tensor) -> Any:
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def composed(policy: kvprune.TokenPolicy) -> Read:
        policy = policy.for_tokenizer(tokenizer)

        def read(ids: Tensor) -> Any:
            cache = ComposedCache([policy])
            kvprune.read(model, cache, ids)
            return cache

        return read

    each = [
        SnapKV(0.25),
        AdaKV(SnapKV(0.25)),
        CriticalKV(SnapKV(0.25)),
        AdaKV(ExpectedAttention(0.25, epsilon=0.01)),
        KVzip(0.25),
        KVzip(0.25, plus=True),
    ]
    return {DENSE: dense, **{repr(policy): composed(policy) for policy in each}}


@torch.no_grad()
def prefill(model: Any, tokenizer: Any, ids: Tensor, repeats: int) -> list[dict[str, Any]]:
    """A row for each reader: its time over the dense one's, and the bytes it holds."""
    runs = readers(model, tokenizer)
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    size: dict[str, float] = {}
    for turn in range(repeats):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            start = time.perf_counter()
            cache = runs[name](ids)
            seconds[name].append(time.perf_counter() - start)
            size[name] = held(cache)
    return [
        {
            "what": "prefill",
            "tokens": ids.shape[1],
            "name": name,
            **ratios(seconds[name], seconds[DENSE]),
            "bytes": size[name] / size[DENSE],
        }
        for name in names
    ]


@torch.no_grad()
def steps(model: Any, ids: Tensor, repeats: int) -> list[dict[str, Any]]:
    """R-KV's row: the mean time of a token over many steps, over the dense one's."""
    caches: list[Any] = [DynamicCache(config=model.config), ComposedCache([RKV(SLOTS)])]
    model(ids[:, :SLOTS], past_key_values=caches[0], logits_to_keep=1)
    kvprune.read(model, caches[1], ids[:, : SLOTS + 64])
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for cache, mine in zip(caches, seconds, strict=True):
            start = time.perf_counter()
            for _ in range(STEPS):
                model(ids[:, :1], past_key_values=cache)
                if isinstance(cache, DynamicCache):
                    cache.crop(-1)
            mine.append((time.perf_counter() - start) / STEPS)
    found = ratios(seconds[1], seconds[0])
    return [{"what": "step", "tokens": SLOTS, "name": repr(RKV(SLOTS)), **found}]


def ratios(mine: list[float], dense: list[float]) -> dict[str, float]:
    """The median and the ends of the ratios by turn, without the first, and the seconds."""
    each = sorted(a / b for a, b in zip(mine[1:], dense[1:], strict=True))
    return {
        "ratio": statistics.median(each),
        "low": each[0],
        "high": each[-1],
        "seconds": statistics.median(mine[1:]),
    }


def main() -> None:
    """Measures, and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "by-head.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = demo_model()
    model = kvprune.attach(AutoModelForCausalLM.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    essays = ruler_data("PaulGrahamEssays.json")["text"][: 8 * max(args.contexts)]
    text = tokenizer(essays, return_tensors="pt")["input_ids"]
    rows = steps(model, text, max(3, args.repeats // 2))
    for context in args.contexts:
        rows += prefill(model, tokenizer, text[:, :context], args.repeats)
        for row in rows:
            print(row, flush=True)
        write(args.out, args, model, rows)


if __name__ == "__main__":
    main()
