"""Prefill and decode time of each policy against the dense model, in one process.

    python -m bench.speed --context 2048 --repeats 5 --out bench/results/speed-2048.json

The candidates take turns (A B C A B C ...), each is timed against the dense run of its own
turn, and medians of those ratios are reported with their spread: this machine's clock drifts
more than the differences that matter. Prefill is compared with a dense prefill of the same
prompt, a decode step at a budget of N slots with a dense step at a context of N tokens (SDTP
alone evicts nothing: its step reads what it left of the whole prompt). SDTP runs with random
heads, which cost what trained ones do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Cache, DynamicCache

import kvprune
from kvprune.evaluation.assets import demo_model
from kvprune.policies import H2O, SDTP, SDTPHeads, StreamingLLM

from .about import write

WHOLE = ("dense", "ComposedCache([])")
"""What evicts nothing: its decode step is timed after a prompt of as many tokens as the budget."""

STEPS = 12
WARM_UP = 3


def candidates(config: Any, budget: int) -> dict[str, Callable[[], Cache]]:
    """A fresh cache by name; the first is what the others are compared with."""
    stages = len(range(4, config.num_hidden_layers, 3))
    heads = SDTPHeads(config.hidden_size, config.num_hidden_layers, stages)
    sdtp = SDTP(heads, keep=0.35 ** (1 / stages))
    h2o, streaming = H2O(budget // 2, budget - budget // 2), StreamingLLM(4, budget - 4)
    policies: dict[str, list[kvprune.TokenPolicy]] = {
        "ComposedCache([])": [],
        "StreamingLLM": [streaming],
        "H2O": [h2o],
        "SDTP": [sdtp],
        "SDTP + H2O": [sdtp, h2o],
    }
    made = {n: (lambda p=p: kvprune.ComposedCache(p)) for n, p in policies.items()}
    return {"dense": lambda: DynamicCache(config=config), **made}


def seconds(model: Any, ids: torch.Tensor, cache: Cache) -> float:
    """One forward."""
    start = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - start


def decode_seconds(model: Any, token: torch.Tensor, cache: Cache) -> float:
    """The median of some single-token forwards."""
    return statistics.median([seconds(model, token, cache) for _ in range(STEPS)][WARM_UP:])


@torch.no_grad()
def measure(model: Any, context: int, budget: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of every turn, by candidate: `prefill`, `decode`, and bytes `held`."""
    ids = torch.randint(5, model.config.vocab_size, (1, context))
    runs = candidates(model.config, budget)
    rows: dict[str, dict[str, Any]] = {n: {"prefill": [], "decode": [], "held": 0} for n in runs}
    seconds(model, ids[:, :256], DynamicCache(config=model.config))
    for _ in range(repeats):
        for name, make in runs.items():
            cache = make()
            rows[name]["prefill"].append(seconds(model, ids, cache))
            if name in WHOLE:
                cache = make()
                seconds(model, ids[:, :budget], cache)
            rows[name]["decode"].append(decode_seconds(model, ids[:, :1], cache))
            rows[name]["held"] = getattr(cache, "nbytes", None)
    return rows


def ratios(rows: dict[str, dict[str, Any]], what: str, name: str) -> list[float]:
    """Against the dense run of the same turn, sorted."""
    pairs = zip(rows[name][what], rows["dense"][what], strict=True)
    return sorted(mine / dense for mine, dense in pairs)


def report(rows: dict[str, dict[str, Any]], budget: int) -> None:
    """Prints medians and the smallest and largest ratio."""
    print(f"{'':18} {'prefill s':>9} {'ratio (least, most)':>22} {'decode ms':>9} ratio to dense")
    for name, row in rows.items():
        cells = []
        for what, scale in (("prefill", 1.0), ("decode", 1e3)):
            r = ratios(rows, what, name)
            median = statistics.median(row[what]) * scale
            cells.append(f"{median:9.2f} {statistics.median(r):8.3f} ({r[0]:.2f}, {r[-1]:.2f})")
        print(f"{name:18} {'   '.join(cells)}")
    print(f"decode: at {budget} slots, dense at a context of {budget} tokens")


def main() -> None:
    """Measures, prints, and writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="name or path; default: the demo model")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.model or demo_model()
    model = kvprune.attach(AutoModelForCausalLM.from_pretrained(path))
    rows = measure(model, args.context, args.budget, args.repeats)
    report(rows, args.budget)
    if args.out:
        write(args.out, args, model, rows)


if __name__ == "__main__":
    main()
