"""Measures what a saved prompt costs: bytes, and seconds of reading it against loading it.

    python -m bench.saved --context 2000 --repeats 5 --out bench/results/saved-2000.json

Each turn reads the prompt, saves the cache and loads it, for each policy one after the other. The
report has medians, and the ratios of reading to loading. The file was just written, so the system
reads it from memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import kvprune
from kvprune.evaluation.data.assets import demo_model
from kvprune.policies import H2O, SDTP

from .about import write

POLICIES: dict[str, list[kvprune.TokenPolicy]] = {
    "dense": [],
    "H2O 20 %": [H2O(0.1, 0.1)],
    "SDTP + H2O 20 %": [SDTP(), H2O(0.1, 0.1)],
}


def seconds(work: Callable[[], Any]) -> float:
    """The seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def turn(model: Any, ids: torch.Tensor, name: str, path: Path) -> dict[str, float]:
    """The seconds to read, save and load one prompt with one policy, and the file's bytes."""
    cache = kvprune.ComposedCache(POLICIES[name])
    return {
        "read": seconds(lambda: model(ids, past_key_values=cache, logits_to_keep=1)),
        "save": seconds(lambda: cache.save(path)),
        "load": seconds(lambda: kvprune.ComposedCache.load(path, POLICIES[name], model)),
        "bytes": path.stat().st_size,
    }


def measure(model: Any, context: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """The results of every turn, by policy."""
    ids = torch.randint(5, model.config.vocab_size, (1, context))
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in POLICIES}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.safetensors"
        # A short turn warms up.
        turn(model, ids[:, :256], "dense", path)
        for _ in range(repeats):
            for name, row in rows.items():
                row.append(turn(model, ids, name, path))
    return rows


def report(rows: dict[str, list[dict[str, float]]]) -> None:
    """Prints medians, and the median, least and greatest ratio of reading to loading."""
    for name, turns in rows.items():
        read, save, load, size = (
            statistics.median(t[what] for t in turns) for what in ("read", "save", "load", "bytes")
        )
        ratios = sorted(t["read"] / t["load"] for t in turns)
        print(
            f"{name:16} read {read:6.2f} s  save {save:6.3f} s  load {load:6.3f} s  "
            f"{size / 1e6:6.1f} MB  {statistics.median(ratios):.0f} times "
            f"({ratios[0]:.0f} to {ratios[-1]:.0f})"
        )


def main() -> None:
    """Measures, prints, and writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = kvprune.attach(AutoModelForCausalLM.from_pretrained(demo_model()))
    rows = measure(model, args.context, args.repeats)
    report(rows)
    if args.out:
        write(args.out, args, model, rows)


if __name__ == "__main__":
    main()
