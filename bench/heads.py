"""Trains the SDTP heads that ship for SmolLM2-135M-Instruct.

    python -m bench.heads                                        # those that ship
    python -m bench.heads --row "paper's head" --out build/heads/paper

The examples are of three kinds: questions about SQuAD articles and HotpotQA paragraphs of the
splits to train on (see `kvprune.evaluation.data.questions`), asked in several ways, with the gold
answer as completion; questions about made-up facts that were put into the articles; and stretches
of the articles with their next 64 tokens. A training that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvprune.evaluation.data.assets import demo_model
from kvprune.evaluation.data.questions import (
    ASK_OTHERWISE,
    LongQuestion,
    hidden_facts,
    hotpotqa,
    squad,
)
from kvprune.policies import SDTP, SDTPHeads
from kvprune.policies.sdtp import Example, Training, read_examples, sharing, train, untrained

NAME = "SmolLM2-135M-Instruct"
SHIPPED = Path(__file__).parent.parent / "policies" / "sdtp" / "pretrained" / NAME

STAGES = 9
KEEP = round(0.35 ** (1 / STAGES), 4)
"""The share that each stage keeps: nine stages, all that the model has room for, leave 35 %."""

TOKENS = (350, 900)
LIMIT = 1024
HELD_OUT = 40
PARTS = {"hotpotqa": 0.37, "squad": 0.5, "facts": 0.1, "texts": 0.03}
TOGETHER = {"hotpotqa": 3, "squad": 8, "facts": 4}
"""The number of questions about one context, which are marked in little more time than one."""

FULL = Training(marking_epochs=2, learning_rate=3e-3)
PAPER = replace(FULL, listwise=0.0, ranking=1.0, mse=0.3, pairs=20000)
ROWS: dict[str, tuple[Training, dict[str, Any]]] = {
    "SDTP": (FULL, {}),
    "paper's head": (FULL, {"query_heads": 0}),
    "paper's head and losses": (PAPER, {"query_heads": 0}),
    "paper's head, losses and target": (replace(PAPER, target="gradient"), {"query_heads": 0}),
    "paper's head without ranking": (replace(PAPER, ranking=0.0), {"query_heads": 0}),
    "paper's head without ranking and MSE": (
        replace(PAPER, ranking=0.0, mse=0.0, pruning_epochs=1, distillation=0.0),
        {"query_heads": 0},
    ),
}
"""The options of each row's training, and how its heads differ from the default. Without ranking
and MSE, only the answer's cross-entropy in the pruned model is left: 3 seconds an example, so
ask for fewer with `--examples`."""


def examples(
    tokenizer: Any,
    count: int,
    seed: int,
    split: str = "train",
    parts: Mapping[str, float] = PARTS,
) -> list[Example]:
    """About `count` examples of a split, in the shares that `parts` says."""
    draw, encode = random.Random(f"examples {seed}"), partial(_encoded, tokenizer)
    shares = {name: parts.get(name, 0) for name in PARTS}
    counts, found = {name: round(share * count) for name, share in shares.items()}, list[Example]()
    for name, make in (("hotpotqa", hotpotqa), ("squad", squad), ("facts", hidden_facts)):
        # Held-out examples are few, so each has a context of its own.
        together = TOGETHER[name] if split == "train" else 1
        asked = make(split, counts[name], TOKENS, tokenizer, seed, together)
        for _, group in groupby(asked, key=attrgetter("text")):
            questions = list(group)
            # A context is shared only if the question is not also asked before it.
            ways = [w for w in ASK_OTHERWISE if len(questions) == 1 or _asks_once(w)]
            way = draw.choice(ways)
            found += sharing([encode(q, way) for q in questions])
    if counts["texts"]:
        stories = squad(split, 3 * counts["texts"], TOKENS, tokenizer, seed + 1)
        found += read_examples([q.text for q in stories], tokenizer, LIMIT, 64)[: counts["texts"]]
    return [e for e in found if len(e.prompt) + len(e.completion) <= LIMIT]


def _asks_once(way: tuple[str, str]) -> bool:
    return way[0].count("{question}") == 1


def _encoded(tokenizer: Any, question: LongQuestion, way: tuple[str, str]) -> Example:
    prompt, answer = question.encoded(tokenizer, way)
    return Example(tuple(prompt), tuple(answer))


def main() -> None:
    """Trains the heads of a row; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", default="SDTP", choices=list(ROWS))
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--marks", type=Path, default=Path("build/heads/marks"), help="13 GB")
    parser.add_argument("--out", type=Path, default=Path("build/heads/sdtp"))
    parser.add_argument("--ship", action="store_true", help=f"put them into {SHIPPED}")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    path = demo_model(report=print)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    options, shape = ROWS[asked.row]
    heads = untrained(model, asked.seed, stages=STAGES, keep=KEEP, **shape)
    data = {"parts": PARTS, "together": TOGETHER, "tokens": TOKENS, "limit": LIMIT}
    note = {"row": asked.row, "model_name": NAME, "data": data}
    train(
        model,
        examples(tokenizer, asked.examples, asked.seed),
        asked.out,
        replace(options, seed=asked.seed),
        SDTP(heads),
        held_out=examples(tokenizer, HELD_OUT, asked.seed, "choose"),
        marks=asked.marks,
        keep_hidden=True,
        note=note,
    )
    if asked.ship:
        ship(asked.out)


def ship(folder: Path) -> None:
    """Puts heads into the package, as float16; the model card there is not changed."""
    heads = SDTPHeads.from_pretrained(folder).half()
    heads.save_pretrained(SHIPPED)
    shutil.copy(folder / "training.json", SHIPPED / "training.json")
    size = (SHIPPED / "model.safetensors").stat().st_size
    print(json.dumps({"shipped": str(SHIPPED), "bytes": size}))


if __name__ == "__main__":
    main()
