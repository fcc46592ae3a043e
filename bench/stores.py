"""Measures how far stores are from the dense model, and what a decode step costs with them.

    python -m bench.stores --choose                          # what defaults are chosen by: minutes
    python -m bench.stores --steps                           # a decode step's time: a minute

A store is named BITS-BITS-GROUP, for keys and values; `plain` is none. What they lose of answers,
alone and under policies, is measured by `python -m bench.pareto`.

`--choose` reads texts of the choosing splits, and says how far the model's predictions of their
second halves are from the dense model's: the mean Kullback-Leibler divergence, in nats a token.
`--steps` takes turns between stores, and compares each step with the plain one of its own turn;
kernels are those of the extra `cpu`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvprune
from kvprune.attention import native
from kvprune.evaluation.data.assets import demo_model
from kvprune.evaluation.data.questions import hotpotqa, squad
from kvprune.evaluation.report.statistics import interval

from .about import write
from .costs.candidates import random_prompt

RESULTS = Path(__file__).parent / "results"


def store_of(name: str) -> kvprune.Quantized | None:
    """The store of a name; see above."""
    if name == "plain":
        return None
    keys, values, group = map(int, name.split("-"))
    return kvprune.Quantized((keys, values), group)


CHOSEN_BY, TOKENS = 4, 640
"""The texts of each data set for `--choose`, and the tokens of each."""


@torch.no_grad()
def divergence(model: Any, tokenizer: Any, stores: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of `--choose`, one for each store."""
    room = (TOKENS, TOKENS)
    questions = [
        q for read in (squad, hotpotqa) for q in read("choose", CHOSEN_BY, room, tokenizer)
    ]
    prompts = [torch.tensor([q.encoded(tokenizer)[0][-TOKENS:]]) for q in questions]

    def predicted(ids: Tensor, store: kvprune.Quantized | None) -> Tensor:
        cache = kvprune.ComposedCache(store=store)
        logits = model(ids, past_key_values=cache, logits_to_keep=TOKENS // 2).logits
        return logits[0].log_softmax(-1)

    rows = []
    dense = [predicted(ids, None) for ids in prompts]
    for name in stores:
        each = []
        for ids, before in zip(prompts, dense, strict=True):
            away = before - predicted(ids, store_of(name))
            each.append(float((before.exp() * away).sum(-1).mean()))
        low, high = interval(each)
        rows.append({"store": name, "divergence": sum(each) / len(each), "low": low, "high": high})
        print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def steps(model: Any, stores: Sequence[str], context: int, count: int = 75) -> list[dict[str, Any]]:
    """Rows of `--steps`: the median of a step over the plain one of its turn.

    With kernels and without, where numba is installed.
    """
    ids = random_prompt(model, 1, context)
    with_kernels = [True, False] if native.cpu_kernels_for(torch.zeros(1)) else [False]
    kinds = [("plain", False), *product(stores, with_kernels)]
    caches = {kind: kvprune.ComposedCache(store=store_of(kind[0])) for kind in kinds}
    seconds: dict[tuple[str, bool], list[float]] = {kind: [] for kind in kinds}
    for cache in caches.values():
        model(ids, past_key_values=cache, logits_to_keep=1)
    for _ in range(count):
        for kind, cache in caches.items():
            with nullcontext() if kind[1] else patch.object(native, "_imported", lambda: None):
                start = time.perf_counter()
                model(ids[:, :1], past_key_values=cache)
                seconds[kind].append(time.perf_counter() - start)
    rows = []
    for (name, kernels), each in seconds.items():
        ratios = [a / b for a, b in zip(each[3:], seconds["plain", False][3:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row = {"store": name, "kernels": kernels, "context": context}
        rows.append({**row, "ratio": middle, "quartiles": [low, high]})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measures, and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--stores", nargs="+", default=["plain", "8-8-32", "5-4-64", "4-4-32"])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--choose", action="store_true")
    mode.add_argument("--steps", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: a file of bench/results")
    args = parser.parse_args()
    name = "stores-choosing" if args.choose else "stores-steps"
    out = args.out or RESULTS / f"{name}.json"
    torch.set_num_threads(args.threads)
    path = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = kvprune.attach(AutoModelForCausalLM.from_pretrained(path))
    stores = [name for name in args.stores if name != "plain"]
    if args.choose:
        write(out, args, model, divergence(model, tokenizer, stores))
    else:
        write(out, args, model, steps(model, stores, args.context))


if __name__ == "__main__":
    main()
