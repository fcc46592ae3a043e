"""Measures transformers' `QuantizedCache` beside `Quantized`: bytes, divergence, a step's time.

    pip install --no-deps --target build/backends optimum-quanto hqq
    PYTHONPATH=build/backends python -m bench.quantized_cache

Of each text of the choosing splits, 512 tokens are read, and then 128 more in one forward, which
attends to what was quantised. `QuantizedCache` holds the newest tokens as they are until there are
128 of them, so that these see the 512 alone in few bits. So they do with kvprune's stores where
`divergence` is measured: what is read back is handed on in a `DynamicCache`. `whole` is the
divergence where the 128 are quantised as well, as they are in use. Both are those of
`bench.stores`, over the 128 positions. Bytes are of what is quantised, over bfloat16; scales and
zero points count at two bytes each. A step is a decode step behind 1,024 tokens, over one with
`DynamicCache`, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache

import kvprune
from kvprune.evaluation.data.assets import demo_model
from kvprune.evaluation.data.questions import hotpotqa, squad
from kvprune.evaluation.report.statistics import interval

from .about import write
from .costs.candidates import random_prompt
from .stores import CHOSEN_BY, TOKENS

RESULTS = Path(__file__).parent / "results" / "quantized-cache.json"
READ, NEW = 512, 128
CONTEXT, STEPS = 1024, 20


def caches(config: Any) -> dict[str, Callable[[], Any]]:
    """What makes each cache."""
    # The axes that transformers' documentation names for each package.
    axes, found = {"quanto": 0, "hqq": 1}, dict[str, Callable[[], Any]]()
    for backend, bits in (("quanto", 4), ("hqq", 4), ("hqq", 8)):
        given = (backend, config, bits, axes[backend], axes[backend], 64)
        found[f"QuantizedCache({backend!r}, nbits={bits})"] = partial(QuantizedCache, *given)
    for store in (kvprune.Quantized(), kvprune.Quantized(4, 64), kvprune.Quantized(8, 64)):
        found[repr(store)] = partial(kvprune.ComposedCache, store=store)
    return found


def _tensors(held: Any) -> Iterator[Tensor]:
    """The tensors that a backend holds for keys, or for values."""
    if isinstance(held, (tuple, list)):
        for each in held:
            yield from _tensors(each)
    elif isinstance(held, dict):
        yield from _tensors(list(held.values()))
    elif hasattr(held, "_shift"):
        # A tensor of quanto's: codes, scales and zero points.
        yield from (held._data._data, held._scale, held._shift)
    elif isinstance(held, Tensor):
        yield held


def _share_of_bfloat16(cache: Any, dense: int) -> float:
    """The bytes of codes and grids over `dense` numbers of two bytes each."""
    if isinstance(cache, kvprune.ComposedCache):
        pairs = [pair for _, layer in cache.slot_layers() for pair in layer.coded() or ()]
        held = [tensor for coded in pairs for tensor in (coded.codes, coded.grid)]
    else:
        held = [
            tensor
            for layer in cache.layers
            for tensor in _tensors([layer._quantized_keys, layer._quantized_values])
        ]
    each = (t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in held)
    return sum(each) / (2 * dense)


@torch.no_grad()
def rows(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """A row for each cache."""
    room = (TOKENS, TOKENS)
    questions = [
        q for make in (squad, hotpotqa) for q in make("choose", CHOSEN_BY, room, tokenizer)
    ]
    texts = [torch.tensor([q.encoded(tokenizer)[0][-TOKENS:]]) for q in questions]

    def predicted(ids: Tensor, cache: Any, read_back: bool = True) -> tuple[Tensor, Any]:
        model(ids[:, :READ], past_key_values=cache, logits_to_keep=1)
        behind = cache
        if read_back and isinstance(cache, kvprune.ComposedCache):
            behind = DynamicCache(config=config)
            for index, layer in cache.slot_layers():
                behind.update(layer.keys, layer.values, index)
        logits = model(ids[:, READ : READ + NEW], past_key_values=behind).logits
        return logits[0].log_softmax(-1), cache

    config = model.config
    dense = [predicted(ids, DynamicCache(config=config))[0] for ids in texts]
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    steps = _steps(model)
    found = []
    for name, make in caches(config).items():
        row: dict[str, Any] = {"cache": name}
        for kind, read_back in (("divergence", True), ("whole", False)):
            each, cache = [], make()
            if kind == "whole" and not isinstance(cache, kvprune.ComposedCache):
                continue
            for ids, before in zip(texts, dense, strict=True):
                after, cache = predicted(ids, make(), read_back)
                each.append(float((before.exp() * (before - after)).sum(-1).mean()))
            held = READ if isinstance(cache, kvprune.ComposedCache) and read_back else READ + NEW
            row["bytes"] = round(_share_of_bfloat16(cache, numbers * held), 4)
            row[kind] = [sum(each) / len(each), *interval(each)]
        found.append({**row, "step": steps[name]})
        print(found[-1], flush=True)
    return found


def _steps(model: Any) -> dict[str, float]:
    """The median of each cache's decode step over that of `DynamicCache` in its turn."""
    ids = random_prompt(model, 1, CONTEXT)
    made = {"dense": DynamicCache(config=model.config)}
    made |= {name: make() for name, make in caches(model.config).items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for cache in made.values():
        model(ids, past_key_values=cache, logits_to_keep=1)
    for _ in range(STEPS):
        for name, cache in made.items():
            start = time.perf_counter()
            model(ids[:, :1], past_key_values=cache)
            seconds[name].append(time.perf_counter() - start)
    dense = seconds["dense"][2:]
    return {
        name: statistics.median(a / b for a, b in zip(each[2:], dense, strict=True))
        for name, each in seconds.items()
    }


def main() -> None:
    """Measures, and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = demo_model()
    model = kvprune.attach(AutoModelForCausalLM.from_pretrained(path))
    write(args.out, args, model, rows(model, AutoTokenizer.from_pretrained(path)))


if __name__ == "__main__":
    main()
