"""What evicting loses of answers: Saliency beside the field's best, at equal shares of the slots.

    python -m bench.evicting --samples 100  # an hour of two cores; goes on where it stopped

Questions are those of the splits to test with (`kvprune compare`'s tasks); nothing was learned from
them, nor chosen by them. Figures are nats a token of the gold answer, paired with the dense model's
on the same question, with bootstrap intervals of 95 %; bytes are over the dense ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvprune.evaluation.compare.compare import Run, measured
from kvprune.evaluation.compare.plan import Plan
from kvprune.evaluation.data.assets import demo_model
from kvprune.evaluation.report.statistics import interval

RESULTS = Path(__file__).parent / "results" / "evicting.json"
POLICIES = ("saliency", "sdtp+saliency", "adakv(base=snapkv(0.25))")
BUDGETS = (0.35, 0.25, 0.125, 0.0625)
TWICE = ("kvzip(0.25,plus=True)",)
"""Read the prompt a second time, so that they are measured at fewer shares."""
TWICE_BUDGETS = (0.25, 0.125)
TASKS = ("squad", "hotpotqa")


def rows(path: Path) -> list[dict[str, Any]]:
    """A row for each policy, share and task in a results file."""
    found: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] == "sample":
            cell = entry["cell"]
            key = cell["task"], cell["context"], cell["label"], cell["budget"]
            found.setdefault(key, {})[entry["sample"]] = entry
    each = []
    for (task, context, label, budget), mine in found.items():
        dense = found[task, context, "dense", None]
        if label == "dense" or not set(mine) <= set(dense):
            continue
        lost = [dense[n]["score"] - mine[n]["score"] for n in mine]
        each.append(
            {
                "task": task,
                "context": context,
                "policy": label,
                "budget": budget,
                "samples": len(lost),
                "nats_lost": round(sum(lost) / len(lost), 4),
                "interval": [round(end, 4) for end in interval(lost)],
                "bytes": round(_over(mine, dense, "bytes_held"), 4),
                "prefill_flops": round(_over(mine, dense, "prefill_flops"), 4),
            }
        )
    return each


def _over(mine: dict[int, Any], dense: dict[int, Any], what: str) -> float:
    total: float = sum(one["cost"][what] for one in mine.values())
    return total / sum(dense[n]["cost"][what] for n in mine)


def main(given: Sequence[str] | None = None) -> None:
    """Runs the comparison and writes its figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--context", type=int, nargs="+", default=[1024])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--twice", type=int, default=50, help="samples of what reads twice; 0")
    parser.add_argument("--work", type=Path, default=Path("build/evicting"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(given)
    run = Run(str(demo_model(report=print)))
    plans = [Plan(asked.policies, TASKS, asked.context, asked.budgets, asked.samples, 0)]
    if asked.twice:
        plans.append(Plan(TWICE, TASKS, asked.context, TWICE_BUDGETS, asked.twice, 0))
    for plan in plans:
        for failure in measured(plan, run, asked.work, progress=True).failures:
            print(failure)
    found = rows(asked.work / "results.jsonl")
    asked.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
