"""Trains the heads of Saliency that ship for SmolLM2-135M-Instruct.

    python -m bench.saliency --ship
    python -m bench.saliency --only squad --out build/heads/squad  # learn from one set alone

The examples are made as those of `bench.heads`: questions about SQuAD articles and HotpotQA
paragraphs of the splits to train on, made-up facts, and stretches of text. Half of them are read
behind SDTP, with the heads that ship; with `--only` none is, as those heads have learned from all
sets. What is measured is the split to choose by. A training that was stopped while it read goes on
there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvprune
from kvprune.evaluation.data.assets import demo_model
from kvprune.policies import SDTP
from kvprune.policies.saliency import train_saliency
from kvprune.policies.saliency.heads import WEIGHTS
from kvprune.policies.saliency.training import ACCOUNT

from .heads import HELD_OUT, PARTS, SHIPPED, examples


def main() -> None:
    """Trains them; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=1200)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("build/heads/saliency"))
    parser.add_argument("--only", choices=["squad", "hotpotqa"], help="the one set to learn from")
    parser.add_argument("--ship", action="store_true", help=f"put them into {SHIPPED}")
    asked = parser.parse_args()
    if asked.ship and asked.only:
        parser.error("heads that ship learn from all sets: leave out --only or --ship")
    torch.set_num_threads(asked.threads)
    path = demo_model(report=print)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = kvprune.attach(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    parts = {asked.only: 1.0} if asked.only else PARTS
    apart = examples(tokenizer, HELD_OUT, asked.seed, "choose", parts)
    said = ""

    def report(stage: str, done: float) -> None:
        nonlocal said
        if (now := f"{stage} {done:.0%}") != said:
            print(now, flush=True)
        said = now

    train_saliency(
        model,
        [*examples(tokenizer, asked.examples, asked.seed, parts=parts), *apart],
        asked.out,
        pruning=[] if asked.only else [SDTP()],
        width=asked.width,
        epochs=asked.epochs,
        held_out=len(apart),
        seed=asked.seed,
        report=report,
    )
    print((asked.out / ACCOUNT).read_text())
    if asked.ship:
        shutil.copy(asked.out / WEIGHTS, SHIPPED / WEIGHTS)
        shutil.copy(asked.out / ACCOUNT, SHIPPED / ACCOUNT)
        print(json.dumps({"shipped": str(SHIPPED), "bytes": (SHIPPED / WEIGHTS).stat().st_size}))


if __name__ == "__main__":
    main()
