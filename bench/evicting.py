"""What evicting loses of answers: Saliency beside the field's best, at equal shares of the slots.

    python -m bench.evicting --samples 100  # an hour of two cores; goes on where it stopped
    python -m bench.evicting --samples 60 --policies saliency --stores quantized --twice 0
    python -m bench.evicting --dtype bfloat16 --out build/bf16.json  # four times as fast with AMX

Questions are those of the splits to test with (`kvprune compare`'s tasks); nothing was learned from
them, nor chosen by them. Figures are nats a token of the gold answer, paired with the dense model's
on the same sample (a question, or with `--questions` a context), with bootstrap intervals of 95 %.
Bytes are over those of the keys and values of the dense model in bfloat16: float32 counts at two
bytes a number where there is no store. They are counted before the last token, or a question that
is unknown, was read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from kvprune.evaluation.command import without_places
from kvprune.evaluation.compare.compare import Run, measured
from kvprune.evaluation.compare.plan import Plan
from kvprune.evaluation.data.assets import demo_model
from kvprune.evaluation.report.statistics import interval
from kvprune.files import write_text

RESULTS = Path(__file__).parent / "results" / "evicting.json"
POLICIES = ("saliency", "sdtp+saliency", "adakv(base=snapkv(0.25))")
BUDGETS = (0.35, 0.25, 0.125, 0.0625)
TWICE = ("kvzip(0.25,plus=True)",)
"""Read the prompt a second time, so that they are measured at fewer shares."""
TWICE_BUDGETS = (0.25, 0.125)
TASKS = ("squad", "hotpotqa")
LEAST = 10
"""A row of fewer questions says nothing."""


def rows(path: Path, numbers: int) -> list[dict[str, Any]]:
    """A row for each policy, share and task in a results file.

    Args:
        path: the file.
        numbers: of one slot's key and value, over all heads of a layer.
    """
    found: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    each_line = [json.loads(line) for line in path.read_text().splitlines()]
    wide = next(entry["dtype"] for entry in each_line if entry["kind"] == "run") == "float32"
    for entry in each_line:
        if entry["kind"] == "sample":
            cell = entry["cell"]
            key = cell["task"], cell["context"], cell["label"], cell["budget"]
            found.setdefault(key, {})[entry["sample"]] = entry
    each = []
    for (task, context, label, budget), mine in found.items():
        dense = found[task, context, "dense", None]
        if label == "dense" or not set(mine) <= set(dense) or len(mine) < LEAST:
            continue
        lost = [dense[n]["score"] - mine[n]["score"] for n in mine]
        plain = "store=" not in next(iter(mine.values()))["cell"]["policy"]
        held = sum(_as_bfloat16(one["cost"], numbers, plain and wide) for one in mine.values())
        whole = sum(2 * numbers * _slots(dense[n]["cost"]) for n in mine)
        each.append(
            {
                "task": task,
                "context": context,
                "policy": without_places(label),
                "budget": budget,
                "samples": len(lost),
                "nats_lost": round(sum(lost) / len(lost), 4),
                "interval": [round(end, 4) for end in interval(lost)],
                "bytes": round(held / whole, 4),
                "prefill_flops": round(
                    sum(one["cost"]["prefill_flops"] for one in mine.values())
                    / sum(dense[n]["cost"]["prefill_flops"] for n in mine),
                    4,
                ),
            }
        )
    return each


def _slots(cost: Mapping[str, Any]) -> float:
    """The slots of all layers where the bytes are counted."""
    return float(sum(cost["held"]))


def _as_bfloat16(cost: Mapping[str, Any], numbers: int, wide: bool) -> float:
    """The bytes held, with two bytes for each number of keys and values that are float32."""
    return cost["bytes_held"] - (2 * numbers * _slots(cost) if wide else 0)


def main(given: Sequence[str] | None = None) -> None:
    """Runs the comparison and writes its figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--context", type=int, nargs="+", default=[1024])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--stores", nargs="+", default=["plain"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--question", default="known")
    parser.add_argument("--questions", type=int, default=1, help="the most about one context")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--model", help="name or path; the demo model")
    parser.add_argument("--twice", type=int, default=50, help="samples of what reads twice; 0")
    parser.add_argument("--work", type=Path, default=Path("build/evicting"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(given)
    path = asked.model or str(demo_model(report=print))
    run, where = Run(path, dtype=asked.dtype), (asked.tasks, asked.context)
    more = {
        "question": asked.question,
        "stores": asked.stores,
        "questions": asked.questions,
    }
    plans = [Plan(asked.policies, *where, asked.budgets, asked.samples, 0, **more)]
    if asked.twice:
        plans.append(Plan(TWICE, *where, TWICE_BUDGETS, asked.twice, 0, **more))
    for plan in plans:
        compared = measured(plan, run, asked.work, progress=True)
        for failure in compared.failures:
            print(failure)
    config: Any = AutoConfig.from_pretrained(path).get_text_config(decoder=True)
    numbers = 2 * config.num_key_value_heads * config.head_dim
    found = rows(asked.work / "results.jsonl", numbers)
    said = {"about": compared.results.run, "rows": found}
    write_text(asked.out, json.dumps(said, indent=1) + "\n")
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
