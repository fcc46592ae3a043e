"""What of an answer is left at which bytes: policies, shares of the slots, and bits of a slot.

    python -m bench.pareto                                   # two hours; goes on where it stopped
    python -m bench.pareto --samples 200 --policies none     # stores alone
    python -m bench.pareto --samples 0                       # the page anew, from the results

The questions are the final splits of SQuAD and HotpotQA (see `kvprune.evaluation.tasks.articles`),
on which nothing was chosen. What is lost is the gold answer's log-likelihood, in nats a token,
paired with the dense model's on the same question. Bytes are those that a cache holds behind the
prompt, over those of its keys and values in bfloat16 with nothing evicted (float32 counts at two
bytes a number where there is no store). A store has its name of a spec: `plain`, `quantized`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvprune
from kvprune.evaluation.data.assets import demo_model
from kvprune.evaluation.report.statistics import interval
from kvprune.evaluation.specs import store_of
from kvprune.evaluation.tasks import task
from kvprune.policies import H2O, SDTP, Saliency, SnapKV

from .about import write

RESULTS = Path(__file__).parent / "results" / "pareto.json"
TASKS = ("squad", "hotpotqa")
STORES = ("plain", "quantized(bits=8)", "quantized")
SHARES = (0.5, 0.25, 0.125)

POLICIES: Mapping[str, Callable[[float], list[kvprune.TokenPolicy]]] = {
    "none": lambda share: [],
    "SDTP": lambda share: [SDTP()],
    "SnapKV": lambda share: [SnapKV(share)],
    "H2O": lambda share: [H2O(heavy=share / 2, recent=share / 2)],
    "Saliency": lambda share: [Saliency(share)],
    "SDTP + SnapKV": lambda share: [SDTP(), SnapKV(share)],
    "SDTP + H2O": lambda share: [SDTP(), H2O(heavy=share / 2, recent=share / 2)],
    "SDTP + Saliency": lambda share: [SDTP(), Saliency(share)],
}
EVICT_NOTHING = ("none", "SDTP")
"""Policies without a share: each stands at a share of 1."""


class Cell(NamedTuple):
    """A pipeline at a share of the slots, in a store."""

    policy: str
    share: float
    store: str


def cells(policies: Iterable[str], shares: Sequence[float], stores: Sequence[str]) -> list[Cell]:
    """All that are measured; the dense model is what each is compared with, and is none of them."""
    found = [
        Cell(policy, share, store)
        for policy in policies
        for share in ((1.0,) if policy in EVICT_NOTHING else shares)
        for store in stores
    ]
    return [cell for cell in found if cell != ("none", 1.0, "plain")]


@torch.no_grad()
def scored(
    model: Any, prompt: Sequence[int], answer: Sequence[int], cache: kvprune.ComposedCache
) -> tuple[float, float]:
    """The mean log-likelihood of an answer behind a prompt, and the share of bytes; see above.

    The prompt's last token is read by itself, behind what is left of the others.
    """
    config = model.config
    model(torch.tensor([prompt[:-1]]), past_key_values=cache, logits_to_keep=1)
    held, numbers = cache.nbytes, 2 * config.num_key_value_heads * config.head_dim
    whole = 2 * numbers * config.num_hidden_layers * (len(prompt) - 1)
    if cache.store is None:
        # Heads share their columns as long as all keep the same, so that this is a mean over heads.
        kept = ((cache.columns(i)[0] >= 0).sum(-1).double().mean() for i, _ in cache.slot_layers())
        held -= sum(map(float, kept)) * numbers * (model.dtype.itemsize - 2)
    logits = model(torch.tensor([[prompt[-1], *answer[:-1]]]), past_key_values=cache).logits
    found = logits[0].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
    return float(found.mean()), held / whole


def measured(
    model: Any, tokenizer: Any, wanted: Sequence[Cell], samples: int, context: int, work: Path
) -> None:
    """Adds a line to a file for each cell, task and sample that it does not have yet."""
    done = {(line["task"], line["sample"], _cell(line)) for line in lines(work, context)}
    pipelines = {cell: POLICIES[cell.policy](cell.share) for cell in wanted}
    drawn = {name: task(name).samples(tokenizer, context, samples, 0) for name in TASKS}
    work.parent.mkdir(parents=True, exist_ok=True)
    for number in range(samples):
        for name, each in drawn.items():
            missing = [cell for cell in wanted if (name, number, cell) not in done]
            if not missing or number >= len(each):
                continue
            sample = each[number]
            answer = tokenizer.encode(f" {sample.answers[0]}", add_special_tokens=False)
            dense, _ = scored(model, sample.prompt, answer, kvprune.ComposedCache())
            found = []
            for cell in missing:
                cache = kvprune.ComposedCache(pipelines[cell], store=store_of(cell.store))
                got, held = scored(model, sample.prompt, answer, cache)
                said = {"task": name, "context": context, "sample": number, **cell._asdict()}
                found.append(json.dumps(said | {"lost": dense - got, "bytes": held}) + "\n")
            with work.open("a", encoding="utf-8") as file:
                file.writelines(found)
            print(f"{name}: {number + 1} of {samples}", flush=True)


def lines(work: Path, context: int) -> Iterator[dict[str, Any]]:
    """What is measured, of prompts of a length; none if there is no such file."""
    if work.exists():
        for line in work.read_text(encoding="utf-8").splitlines():
            if (found := json.loads(line))["context"] == context:
                yield found


def _cell(line: Mapping[str, Any]) -> Cell:
    return Cell(line["policy"], line["share"], line["store"])


def rows(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each cell and task: the mean of what is lost, with its interval, and of bytes."""
    each: dict[tuple[Cell, str], list[Mapping[str, Any]]] = {}
    for line in found:
        each.setdefault((_cell(line), line["task"]), []).append(line)
    said = []
    for (cell, name), mine in each.items():
        lost = [line["lost"] for line in mine]
        low, high = interval(lost)
        row = {**cell._asdict(), "task": name, "samples": len(mine)}
        row |= {"lost": sum(lost) / len(mine), "low": low, "high": high}
        said.append(row | {"bytes": sum(line["bytes"] for line in mine) / len(mine)})
    return said


def main() -> None:
    """Measures, and writes what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--stores", nargs="+", default=list(STORES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/pareto.jsonl"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = kvprune.attach(AutoModelForCausalLM.from_pretrained(path))
    wanted = cells(args.policies, args.shares, args.stores)
    measured(model, tokenizer, wanted, args.samples, args.context, args.work)
    write(args.out, args, model, rows(lines(args.work, args.context)))


if __name__ == "__main__":
    main()
