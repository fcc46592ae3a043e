"""Measures what stores lose of an answer, alone and under policies that evict.

    python -m bench.stores                                   # 200 + 200 questions: hours
    python -m bench.stores --samples 30 --stores 5-4-64 8-8-32 --policies none
    python -m bench.stores --choose                          # what defaults are chosen by: minutes
    python -m bench.stores --steps                           # a decode step's time: a minute

The questions are the final splits of SQuAD and HotpotQA (see `kvprune.evaluation.tasks.articles`),
on which nothing was chosen. What is lost is the gold answer's log-likelihood, in nats a token,
paired with the dense model's on the same question. Bytes are those that a cache holds behind the
prompt, over those of its keys and values in bfloat16 with nothing evicted (float32 counts at two
bytes a number where there is no store). A store is named BITS-BITS-GROUP, for keys and values;
`plain` is none.

`--choose` reads texts of the choosing splits, and says how far the model's predictions of their
second halves are from the dense model's: the mean Kullback-Leibler divergence, in nats a token.
`--steps` takes turns between stores, and compares each step with the plain one of its own turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvprune
from kvprune.evaluation.data.assets import demo_model
from kvprune.evaluation.data.questions import hotpotqa, squad
from kvprune.evaluation.report.statistics import interval
from kvprune.evaluation.tasks import task
from kvprune.policies import H2O, SDTP, SnapKV

from .about import write
from .costs.candidates import random_prompt

RESULTS = Path(__file__).parent / "results"

POLICIES: dict[str, Callable[[float], list[kvprune.TokenPolicy]]] = {
    "none": lambda share: [],
    "SnapKV": lambda share: [SnapKV(share)],
    "H2O": lambda share: [H2O(heavy=share / 2, recent=share / 2)],
    "SDTP + SnapKV": lambda share: [SDTP(), SnapKV(share)],
    "SDTP + H2O": lambda share: [SDTP(), H2O(heavy=share / 2, recent=share / 2)],
}


def store_of(name: str) -> kvprune.Quantized | None:
    """The store of a name; see above."""
    if name == "plain":
        return None
    keys, values, group = map(int, name.split("-"))
    return kvprune.Quantized((keys, values), group)


@torch.no_grad()
def scored(
    model: Any, prompt: Sequence[int], answer: Sequence[int], cache: kvprune.ComposedCache
) -> tuple[float, float]:
    """The mean log-likelihood of an answer behind a prompt, and the share of bytes; see above."""
    config = model.config
    last = model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits
    held, numbers = cache.nbytes, config.num_hidden_layers * config.num_key_value_heads
    numbers *= 2 * config.head_dim * len(prompt)
    if cache.store is None:
        states = sum(layer.keys.nbytes + layer.values.nbytes for _, layer in cache.slot_layers())
        held -= states - states * 2 // model.dtype.itemsize
    rest = model(torch.tensor([answer]), past_key_values=cache).logits
    logits = torch.cat([last, rest[:, :-1]], 1)[0].log_softmax(-1)
    found = logits.gather(1, torch.tensor(answer)[:, None])
    return float(found.mean()), held / (2 * numbers)


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
def steps(model: Any, stores: Sequence[str], context: int, count: int = 25) -> list[dict[str, Any]]:
    """Rows of `--steps`: the median of a step over the plain one of its turn."""
    ids = random_prompt(model, 1, context)
    caches = {n: kvprune.ComposedCache(store=store_of(n)) for n in ("plain", *stores)}
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for cache in caches.values():
        model(ids, past_key_values=cache, logits_to_keep=1)
    for _ in range(count):
        for name, cache in caches.items():
            start = time.perf_counter()
            model(ids[:, :1], past_key_values=cache)
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, each in seconds.items():
        ratios = [a / b for a, b in zip(each[3:], seconds["plain"][3:], strict=True)]
        rows.append({"store": name, "context": context, "ratio": statistics.median(ratios)})
        print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def losses(model: Any, tokenizer: Any, args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """All rows so far of what answers lose, after each task."""
    wanted = [
        (policy, share, store)
        for policy in args.policies
        for share in ([1.0] if policy == "none" else args.shares)
        for store in args.stores
        if (policy, store) != ("none", "plain")
    ]
    rows: list[dict[str, Any]] = []
    for name in ("squad", "hotpotqa"):
        lost: dict[Any, list[tuple[float, float]]] = {each: [] for each in wanted}
        samples = task(name).samples(tokenizer, args.context, args.samples, 0)
        for done, sample in enumerate(samples, 1):
            answer = tokenizer.encode(f" {sample.answers[0]}", add_special_tokens=False)
            dense, _ = scored(model, sample.prompt, answer, kvprune.ComposedCache())
            for each in wanted:
                policy, share, store = each
                cache = kvprune.ComposedCache(POLICIES[policy](share), store=store_of(store))
                got, held = scored(model, sample.prompt, answer, cache)
                lost[each].append((dense - got, held))
            print(f"{name}: {done} of {len(samples)}", flush=True)
        for (policy, share, store), found in lost.items():
            nats, shares = [nats for nats, _ in found], [held for _, held in found]
            low, high = interval(nats)
            row = {"task": name, "policy": policy, "share": share, "store": store}
            row |= {"lost": sum(nats) / len(nats), "low": low, "high": high, "samples": len(nats)}
            rows.append(row | {"bytes": sum(shares) / len(shares)})
            print(rows[-1], flush=True)
        yield rows


def main() -> None:
    """Measures, and writes JSON after each task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--stores", nargs="+", default=["plain", "8-8-32", "5-4-64", "4-4-32"])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.25, 0.125])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--choose", action="store_true")
    mode.add_argument("--steps", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: a file of bench/results")
    args = parser.parse_args()
    name = "stores-choosing" if args.choose else "stores-steps" if args.steps else "stores"
    out = args.out or RESULTS / f"{name}.json"
    torch.set_num_threads(args.threads)
    path = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = kvprune.attach(AutoModelForCausalLM.from_pretrained(path))
    stores = [name for name in args.stores if name != "plain"]
    if args.choose:
        write(out, args, model, divergence(model, tokenizer, stores))
    elif args.steps:
        write(out, args, model, steps(model, stores, args.context))
    else:
        for rows in losses(model, tokenizer, args):
            write(out, args, model, rows)


if __name__ == "__main__":
    main()
