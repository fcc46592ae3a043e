"""Time, FLOPs and memory of each policy against the dense model, in one process.

    python -m bench.speed --context 4096 --repeats 5 --out bench/results/speed-4096.json
    python -m bench.performance   # docs/performance.md, from all such files

The candidates take turns (A B C A B C ...), each is timed against the dense run of its own
turn, and medians of those ratios are reported with their spread: this machine's clock drifts
more than the differences that matter. Prefill is compared with a dense prefill of the same
prompt, a decode step at a budget of N slots with a dense step at a context of N tokens (SDTP
alone evicts nothing: its step reads what it left of the whole prompt). With `--new`, dense and
SDTP + H2O also generate that many tokens behind the prompt, as a whole. SDTP runs with random
heads, which cost what trained ones do. FLOPs are those of `kvprune.evaluation.flops`; live bytes
are counted in a run of their own (see `bench.live`), and are of tensors beyond the weights.
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
from kvprune.evaluation.flops import Flops, layers_of, own_flops
from kvprune.policies import H2O, SDTP, SDTPHeads, StreamingLLM

from .about import write
from .live import LiveBytes

WHOLE = ("dense", "ComposedCache([])")
"""What evicts nothing: its decode step is timed after a prompt of as many tokens as the budget."""

GENERATED = ("dense", "SDTP + H2O")
"""What `--new` is measured of."""

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


def whole_seconds(model: Any, ids: torch.Tensor, cache: Cache, new: int) -> float:
    """Of a prompt and `new` greedy tokens, inside `generate`."""
    start = time.perf_counter()
    greedy = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    model.generate(ids, past_key_values=cache, **greedy)
    return time.perf_counter() - start


def memory_of(model: Any, ids: torch.Tensor, cache: Cache) -> dict[str, int]:
    """The most bytes alive while a prompt is read, and those that its cache then holds."""
    with LiveBytes() as live:
        model(ids, past_key_values=cache, logits_to_keep=1)
    layers: Any = cache.layers
    held = getattr(cache, "nbytes", None)
    if held is None:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return {"live": live.peak, "held": held}


def flops_of(model: Any, flops: Flops, ids: torch.Tensor, cache: Cache) -> float:
    """Of reading a prompt, with what the policies compute."""
    entered: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0].shape[1]))
        for layer in layers_of(model)
    ]
    with own_flops(model) as own:
        model(ids, past_key_values=cache, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return flops.of_prompt(ids.shape[1], entered) + sum(own)


@torch.no_grad()
def measure(
    model: Any, context: int, budget: int, repeats: int, new: int
) -> dict[str, dict[str, Any]]:
    """Seconds of every turn, by candidate (`prefill`, `decode`, `whole`), bytes and FLOPs."""
    ids = torch.randint(5, model.config.vocab_size, (1, context))
    runs, flops = candidates(model.config, budget), Flops.measured(model)
    rows: dict[str, dict[str, Any]] = {}
    for name, make in runs.items():
        rows[name] = {"prefill": [], "decode": [], "whole": [], **memory_of(model, ids, make())}
        rows[name]["flops"] = flops_of(model, flops, ids, make())
    for _ in range(repeats):
        for name, make in runs.items():
            _turn(model, ids, budget, name, make, rows[name])
        for name in GENERATED if new else ():
            rows[name]["whole"].append(whole_seconds(model, ids, runs[name](), new))
    return rows


def _turn(
    model: Any,
    ids: torch.Tensor,
    budget: int,
    name: str,
    make: Callable[[], Cache],
    row: dict[str, Any],
) -> None:
    cache = make()
    row["prefill"].append(seconds(model, ids, cache))
    if name in WHOLE:
        cache = make()
        seconds(model, ids[:, :budget], cache)
    row["decode"].append(decode_seconds(model, ids[:, :1], cache))


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
        share = row["flops"] / rows["dense"]["flops"]
        held, live = row["held"] / 1e6, row["live"] / 1e6
        print(
            f"{name:18} {'   '.join(cells)}   FLOPs {share:.3f}, {held:.1f} held, {live:.1f} live"
        )
        if row["whole"]:
            r = ratios(rows, "whole", name)
            print(
                f"{'':18} whole {statistics.median(row['whole']):.2f} s {statistics.median(r):.3f}"
            )
    print(f"decode: at {budget} slots, dense at a context of {budget} tokens; MB held and at peak")


def main() -> None:
    """Measures, prints, and writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="name or path; default: the demo model")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=0, help="also generate so many tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.model or demo_model()
    model = kvprune.attach(AutoModelForCausalLM.from_pretrained(path))
    rows = measure(model, args.context, args.budget, args.repeats, args.new)
    report(rows, args.budget)
    if args.out:
        write(args.out, args, model, rows)


if __name__ == "__main__":
    main()
