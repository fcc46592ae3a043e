"""Measures what pruning hidden states loses: SDTP against everything that needs no training.

    python -m bench.sdtp --out bench/results/sdtp                # all of it: hours
    python -m bench.sdtp --tasks squad --questions 20            # a look

There are three kinds of items:

* questions about contexts of 1,000 to 1,500 tokens, from splits that nothing was trained on or
  chosen by (see `kvprune.evaluation.data.questions`; `--split choose` is for choosing). The figure
  is the teacher-forced negative log-likelihood of the gold answer's tokens;
* needles. The figure is whether the model repeats the number;
* plain text. The figure is the likelihood of its next 128 tokens, which hardly notices dropped
  tokens.

All rows run on the same items (the oracles, which cost a backward, on the first of them); shares
and differences are paired, with bootstrap intervals. The intervals resample questions, not
articles: they hold for these articles (SQuAD's final split has seven). Random scores are drawn
three times.

Each result is appended to `OUT.jsonl` as soon as it is known: a run that was stopped goes on where
it was. `OUT.json` is the summary, `OUT.md` a table of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvprune
from kvprune.evaluation.data.assets import demo_model
from kvprune.policies import H2O, SDTP, SDTPHeads, StreamingLLM
from kvprune.policies.sdtp import saliency

from .about import command
from .baselines import GivenScores, HiddenNorm, LastQueryAttention, Newest, scheduled
from .items import LENGTHS, QUESTIONS, Item, Items
from .summary import results, summary
from .tables import sdtp_table

NEEDLE_LENGTHS = (1024, 2048)
ORACLES = ("saliency oracle", "signed saliency oracle")
DRAWS = 3
"""The number of draws of random scores per item; every share is taken of their mean."""


class Bench:
    """The model, and the policies of all rows.

    Args:
        dtype: the dtype of the model.
        heads: more rows: the name of each, and the folder of its heads.
    """

    def __init__(self, dtype: torch.dtype, heads: dict[str, Path]) -> None:
        path = demo_model(report=lambda line: print(line, file=sys.stderr))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.items = Items(self.tokenizer)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self.model: Any = kvprune.attach(model.eval().requires_grad_(False))
        self.default = SDTP().for_model(self.model)
        assert self.default.heads is not None
        self.others = {
            name: replace(self.default, heads=SDTPHeads.from_pretrained(folder).float())
            for name, folder in heads.items()
        }

    def rows(self, item: Item, draw: int = 0) -> dict[str, Callable[[], list[Any]]]:
        """Makers of each row's policies, by the row's name; `random` depends on `draw`."""
        model, plan = self.model, self.default
        h2o, streaming = H2O(heavy=0.2, recent=0.2), StreamingLLM(sinks=4, window=0.4)
        generator = torch.Generator().manual_seed(item.number + 10_000 * draw)
        heads = plan.heads
        assert isinstance(heads, SDTPHeads)
        stages, columns = len(heads.layers), item.prompt.shape[1]
        chance = torch.rand(columns, generator=generator).expand(stages, -1)
        oracle: Any = cache(lambda: saliency(model, item.prompt, heads.layers, signed=True)[0])
        return {
            "dense": list,
            "random": lambda: [scheduled(GivenScores, plan, scores=chance)],
            "SDTP": lambda: [plan],
            **{name: partial(list, [policy]) for name, policy in self.others.items()},
            "SDTP-low": lambda: [replace(plan, stages=5)],
            "newest": lambda: [scheduled(Newest, plan)],
            "hidden norm": lambda: [scheduled(HiddenNorm, plan)],
            "last-query attention": lambda: [scheduled(LastQueryAttention, plan, model=model)],
            ORACLES[0]: lambda: [scheduled(GivenScores, plan, scores=oracle().abs())],
            ORACLES[1]: lambda: [scheduled(GivenScores, plan, scores=oracle())],
            "H2O 40 %": lambda: [h2o],
            "SDTP + H2O 40 %": lambda: [plan, h2o],
            "StreamingLLM 40 %": lambda: [streaming],
        }

    @torch.no_grad()
    def nll(self, item: Item, policies: list[kvprune.TokenPolicy]) -> dict[str, float]:
        """The negative log-likelihood of the answer, as a mean over its tokens, in `value`.

        Where an item has facts, also the shares of supporting and other sentences that the last
        layer holds. The answer is read in one forward: policies evict after it.
        """
        held = kvprune.ComposedCache(policies)
        logits = self.model(item.prompt, past_key_values=held, logits_to_keep=1).logits
        said: dict[str, float] = {}
        if item.facts is not None:
            last = held.columns(len(held) - 1)[0]
            said = {
                name: float((item.facts == fact)[last].float().sum(-1).mean())
                / int((item.facts == fact).sum())
                for name, fact in (("supporting_kept", 1), ("others_kept", 0))
            }
        count = item.answer.shape[1] - 1
        if count:
            # All of these logits are asked for, so that none of these tokens is pruned.
            rest: Any = {"past_key_values": held, "logits_to_keep": count}
            logits = torch.cat([logits, self.model(item.answer[:, :-1], **rest).logits], 1)
        return {"value": float(F.cross_entropy(logits[0].float(), item.answer[0])), **said}

    @torch.no_grad()
    def found(self, item: Item, policies: list[kvprune.TokenPolicy]) -> dict[str, float]:
        """The `value` 1 if the tokens of the answer are generated, 0 otherwise."""
        count = item.answer.shape[1]
        tokens: Any = self.model.generate(
            item.prompt,
            attention_mask=torch.ones_like(item.prompt),
            cache=kvprune.ComposedCache(policies),
            max_new_tokens=count,
            do_sample=False,
        )[:, item.prompt.shape[1] :]
        said, wanted = (self.tokenizer.decode(t[0]).strip() for t in (tokens, item.answer))
        return {"value": float(said.startswith(wanted))}

    def run(
        self, task: str, count: int, split: str, out: Path, only: list[str], oracles: int
    ) -> None:
        """Measures what is missing, and appends it to a file.

        Args:
            task: the task.
            count: how many items of the task.
            split: the split that they are from.
            out: the file of results.
            only: the names of the rows to measure; empty for all rows.
            oracles: how many of the first items oracles are measured on.

        Raises:
            KVPruneError: the file has results of another setting.
        """
        found = results(out)
        for r in found:
            setting = self.setting(split, r["row"])
            if {name: r.get(name) for name in setting} != setting:
                raise kvprune.KVPruneError(
                    f"{out}: expected results of {setting}, got {r}; name another file with --out"
                )
        done = {(r["task"], r["number"], r["row"]) for r in found}
        measure = self.found if task.startswith("needle") else self.nll
        for item in self.items.of(task, count, split):
            for name in self.rows(item):
                # Oracles cost a backward: they run on the first questions alone.
                left_out = name in ORACLES and (task not in QUESTIONS or item.number >= oracles)
                if (only and name not in only) or (task, item.number, name) in done or left_out:
                    continue
                result = {"task": task, "number": item.number, "row": name}
                result |= self.setting(split, name)
                draws = range(DRAWS if name == "random" else 1)
                each = [measure(item, self.rows(item, draw)[name]()) for draw in draws]
                result |= {what: sum(e[what] for e in each) / len(each) for what in each[0]}
                with out.open("a") as file:
                    file.write(json.dumps(result) + "\n")

    def setting(self, split: str, row: str) -> dict[str, Any]:
        """The facts that results of a row must have in common to be put together."""
        heads = self.others.get(row, self.default).heads
        assert isinstance(heads, SDTPHeads)
        learned = row in self.others or row.startswith("SDTP")
        return {
            "split": split,
            "dtype": str(self.model.dtype),
            "lengths": list(LENGTHS),
            "schedule": [self.default.share, *heads.layers],
            "heads": _digest(heads) if learned else None,
        }

    @torch.no_grad()
    def heads_flops(self, tokens: int = 1024) -> dict[str, float]:
        """The FLOPs of each kind of heads in a prefill, as a share of the dense model's.

        They are what a prefill takes beyond one with random scores, which cost nothing on the same
        schedule.
        """
        ids = torch.arange(tokens)[None] + 1000
        item = Item("flops", 0, ids, ids[:, :1])
        rows = self.rows(item)
        count = {}
        for name in ("dense", "random", "SDTP", *self.others):
            with FlopCounterMode(display=False) as counter:
                held = kvprune.ComposedCache(rows[name]())
                self.model(ids, past_key_values=held, logits_to_keep=1)
            count[name] = counter.get_total_flops()
        plain, dense = count.pop("random"), count.pop("dense")
        return {name: round((n - plain) / dense, 5) for name, n in count.items()}


@cache
def _digest(heads: SDTPHeads) -> str:
    weights = b"".join(t.numpy().tobytes() for t in heads.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:16]


def main() -> None:
    """Measures, and writes the summary and the table; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = [*QUESTIONS, *(f"needle-{n}" for n in NEEDLE_LENGTHS), "text"]
    parser.add_argument("--tasks", nargs="*", default=tasks, choices=tasks)
    parser.add_argument("--questions", type=int, default=120, help="of each of the two data sets")
    parser.add_argument("--oracles", type=int, default=40, help="of these, those with oracles")
    parser.add_argument("--needles", type=int, default=30, help="of each length, and texts")
    parser.add_argument("--heads", nargs="*", default=[], metavar="NAME=FOLDER", help="more rows")
    parser.add_argument("--rows", nargs="*", default=[], help="only these")
    parser.add_argument("--split", default="final", choices=["choose", "final"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/results/sdtp"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    heads = {name: Path(folder) for name, folder in (h.split("=", 1) for h in asked.heads)}
    bench = Bench(getattr(torch, asked.dtype), heads)
    lines = asked.out.with_suffix(".jsonl")
    known = set(bench.rows(Item("", 0, torch.zeros(1, 1), torch.zeros(1, 1))))
    if not set(asked.rows) <= known:
        parser.error(f"--rows {asked.rows}: expected some of {sorted(known)}")
    for task in asked.tasks:
        count = asked.questions if task in QUESTIONS else asked.needles
        bench.run(task, count, asked.split, lines, asked.rows, asked.oracles)
    report = {
        "command": command(),
        "dtype": asked.dtype,
        "machine": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "heads_flops": bench.heads_flops(),
        "tasks": summary(results(lines), tasks),
    }
    asked.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    asked.out.with_suffix(".md").write_text(sdtp_table(report))
    print(sdtp_table(report))


if __name__ == "__main__":
    main()
