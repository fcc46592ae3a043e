"""What of an answer is left at which bytes: policies, shares of the slots, and bits of a slot.

    python -m bench.pareto                                   # two hours; goes on where it stopped
    python -m bench.pareto --samples 200 --policies none     # stores alone
    python -m bench.pareto --page                            # the page anew, from the results

What was measured is kept in build/pareto.jsonl: remove it after a change of code.

The questions are the final splits of SQuAD and HotpotQA (see `kvprune.evaluation.tasks.articles`),
on which nothing was chosen. What is lost is the gold answer's log-likelihood, in nats a token,
paired with the dense model's on the same question. Bytes are those that a cache holds behind the
prompt, over those of its keys and values in bfloat16 with nothing evicted (float32 counts at two
bytes a number where there is no store). A store has its name of a spec: `plain`, `quantized`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvprune
from kvprune.errors import KVPruneError
from kvprune.evaluation.data.assets import demo_model
from kvprune.evaluation.report.figures import canvas, finished, look
from kvprune.evaluation.report.palette import INK, MUTED, styles
from kvprune.evaluation.report.pareto import front
from kvprune.evaluation.report.statistics import interval
from kvprune.evaluation.specs import store_of
from kvprune.evaluation.tasks import task
from kvprune.files import write_text
from kvprune.policies import H2O, SDTP, Saliency, SnapKV

from .about import write
from .command import run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "pareto.json"
PAGE = ROOT / "docs" / "pareto.md"
TASKS, CONTEXT = ("squad", "hotpotqa"), 1024
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
            # Written as a whole, so that no run that was killed leaves a part of a line.
            before = [work.read_text(encoding="utf-8")] if work.exists() else []
            write_text(work, "".join([*before, *found]))
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


def together(found: Iterable[Mapping[str, Any]]) -> dict[Cell, dict[str, Any]]:
    """By cell, the row of each task, and the means over tasks of `lost` and `bytes`."""
    each: dict[Cell, dict[str, Any]] = {}
    for row in found:
        each.setdefault(_cell(row), {})[row["task"]] = row
    whole = {cell: tasks for cell, tasks in each.items() if tasks.keys() == set(TASKS)}
    for tasks in whole.values():
        of_tasks = list(tasks.values())
        tasks |= {of: fmean(row[of] for row in of_tasks) for of in ("lost", "bytes")}
    return whole


def best(cells_found: Mapping[Cell, Mapping[str, Any]]) -> list[Cell]:
    """The Pareto front from the fewest bytes on: none has both fewer bytes and fewer nats lost.

    Bytes that are equal in three decimals are equal.
    """
    points = [(round(row["bytes"], 3), -row["lost"]) for row in cells_found.values()]
    on = [cell for cell, is_on in zip(cells_found, front(points), strict=True) if is_on]
    return sorted(on, key=lambda cell: cells_found[cell]["bytes"])


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """The text of the page."""
    each = together(found)
    samples = [row["samples"] for row in found]
    told = f"{min(samples)} to {max(samples)}" if min(samples) < max(samples) else f"{samples[0]}"
    order = sorted(each, key=lambda cell: each[cell]["bytes"])
    return (
        HEAD.format(samples=told)
        + _table(each, best(each))
        + "\n## All of them\n\n"
        + _table(each, order)
    )


def _table(each: Mapping[Cell, Mapping[str, Any]], order: Sequence[Cell]) -> str:
    lines = [
        "| bytes | policy | slots | store | mean lost | SQuAD | HotpotQA |",
        "| ---: | --- | ---: | --- | ---: | --- | --- |",
    ]
    for cell in order:
        row = each[cell]
        said = [f"{row['bytes']:.3f}", cell.policy, f"{cell.share:g}", f"`{cell.store}`"]
        said.append(f"{row['lost']:.2f}")
        said += [
            f"{one['lost']:.2f} ({one['low']:.2f} to {one['high']:.2f}), {one['samples']}"
            for one in (row[name] for name in TASKS)
        ]
        lines.append(f"| {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


HEAD = """# Shares, bits and policies

Evicting slots and holding them in few bits both save bytes, and go together: which of the two pays
where? SmolLM2-135M-Instruct reads prompts of about 1,024 tokens. What is lost is the log-likelihood
of the gold answer against the dense model on the same question, in nats a token ({samples}
questions of each set, the final splits, with 95 % bootstrap intervals). Bytes are all that a cache
holds behind the prompt, over those of the dense keys and values in bfloat16; keys and values that
are float32 here count at two bytes a number. *Slots* is the share that stays. SDTP by itself has no
share: its schedule stops tokens on their way down, so that deeper layers hold fewer. `make pareto`
measures all of it, and makes this page.

Bits cost little at any share: the policy decides. With learned scores (Saliency) a quarter of the
slots in 5 and 4 bits loses about as much as all slots do in them; with SnapKV or H2O it is better
to keep more slots in fewer bits than fewer slots in more.

![Nats lost against bytes: one line for each policy and store](pareto.svg)

The picture has the mean of both sets.

## The Pareto front

Nothing that was measured has both fewer bytes (in three decimals) and a smaller mean than one of
these. Intervals overlap, so that neighbours may change places.

"""


def picture(found: Sequence[Mapping[str, Any]]) -> str:
    """The SVG of the page: a line for each policy and store, and rings around the front."""
    from matplotlib.lines import Line2D

    each = together(found)
    style = styles([name for name in POLICIES if any(cell.policy == name for cell in each)])
    lines: dict[str, Any] = dict(zip(STORES, ("-", "--", ":"), strict=True))
    ring: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 10}
    ring |= {"markerfacecolor": "none", "markeredgecolor": INK}
    looks: dict[str, dict[str, Any]] = {
        name: {"color": one.colour, "marker": one.marker, "markersize": 5}
        for name, one in style.items()
    }
    legend = [(Line2D([], [], **drawn), name) for name, drawn in looks.items()]
    legend += [(Line2D([], [], color=INK, linestyle=line), name) for name, line in lines.items()]
    legend.append((Line2D([], [], **ring), "Pareto front"))
    title = "Nats lost against bytes"
    with look("pareto"):
        figure, axes = canvas(title, 3.6, legend)
        for name, drawn in looks.items():
            for store, line in lines.items():
                mine = [row for cell, row in each.items() if cell[::2] == (name, store)]
                mine.sort(key=lambda row: row["bytes"])
                axes.plot(*_points(mine), linestyle=line, **drawn)
        axes.plot(*_points([each[cell] for cell in best(each)]), **ring)
        axes.axhline(0, color=MUTED, linewidth=0.9)
        axes.set_xscale("log", base=2)
        ticks = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
        axes.set_xticks(ticks, [f"1/{round(1 / tick)}" if tick < 1 else "1" for tick in ticks])
        axes.set(xlabel="bytes over dense in bfloat16", ylabel="nats lost a token")
        return finished(figure, "pareto", title).svg


def _points(each: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["bytes"] for row in each], [row["lost"] for row in each]


def main() -> int:
    """Measures, and writes what was found; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=30, help="of each task, from 1 on")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--stores", nargs="+", default=list(STORES), choices=list(STORES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", action="store_true", help="the page alone, from the results")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pareto.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.samples < 1:
        parser.error("--samples: expected at least 1")
    return run("pareto", partial(_all, args))


def _all(args: argparse.Namespace) -> None:
    if not args.page:
        torch.set_num_threads(args.threads)
        path = demo_model(report=print)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = kvprune.attach(AutoModelForCausalLM.from_pretrained(path))
        wanted = cells(args.policies, args.shares, args.stores)
        measured(model, tokenizer, wanted, args.samples, args.context, args.work)
        mine = rows(lines(args.work, args.context))
        of_page = set(cells(POLICIES, SHARES, STORES)) <= together(mine).keys()
        if args.out == RESULTS and not (of_page and args.context == CONTEXT):
            raise KVPruneError(
                f"pareto: the page has all policies, shares and stores at {CONTEXT} tokens, and "
                f"{args.work.name} has not: expected a run without --policies, --shares, --stores "
                f"and --context before, or another --out"
            )
        write(args.out, args, model, mine)
    if args.out != RESULTS:
        return
    found = json.loads(args.out.read_text())["rows"]
    write_text(PAGE, page(found))
    write_text(PAGE.with_suffix(".svg"), picture(found))


if __name__ == "__main__":
    sys.exit(main())
