"""Makes docs/comparison.md and its figures from bench/results/comparison.json and findings.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.peers.rows import DENSE, OURS, THEIRS
from kvprune.evaluation.compare.worker import NO_CONTEXT
from kvprune.evaluation.report.figures import canvas, finished, look
from kvprune.evaluation.report.palette import INK, styles

ROOT = Path(__file__).parents[2]
NAME, FIGURES = "comparison.json", "comparison"
RESULTS = ROOT / "bench" / "results" / NAME
PAGE = ROOT / "docs" / "comparison.md"
FINDINGS = Path(__file__).with_name("findings.md")

HEAD = """# A comparison

SmolLM2-135M-Instruct, float32, on two CPU cores: every policy at budgets of {budgets} of the
prompt, {samples} samples a cell, the same ones for all.{beside} `make comparison` measures
it{missing} and writes this page from `bench/results/comparison.json`. The whole report of kvprune's
side, with what each policy keeps of a text, is [one page](comparison/report.html).
"""

BESIDE = """ Beside them
presses of [kvpress](https://github.com/NVIDIA/kvpress) on the same prompts of SQuAD at {contexts}
tokens, in an environment of their own."""

SCORES = {
    "squad": "the mean log-likelihood of the gold answer's tokens, in nats",
    "needle": "the share of hidden numbers that stand in the answer",
}

METHOD = """## How it was measured

* {scores}. "No context" is the question alone.
* All of a prompt but its last token is read at once and evicted from; that token and the answer are
  then told from what is left. kvprune's policies go on evicting; a press evicts once, and what is
  read after it stays.
* "Minus dense" is paired by sample with each library's own dense run, with 95 % bootstrap
  intervals: they say how far other samples of the same kind may lie, and nothing of other models.
* A budget is the share of the prompt's slots that a layer keeps. SDTP prunes hidden states by its
  own schedule and has no budget; StreamingLLM's four sinks come on top of its window in kvprune.
  "KV / dense" is of the bytes held, statistics included.
* Policies that differ in what they evict alone shared one reading of each prompt
  (`--executor shared`): scores are the same to the bit. Prefill seconds are of one sample that each
  cell read by itself, so they are rough; FLOPs are counted. kvpress's time was not measured here.
"""


def groups(said: dict[str, Any]) -> list[tuple[str, int]]:
    """The pairs of task and context, in the order in which they were run."""
    return list(dict.fromkeys((row["task"], row["context"]) for row in said["rows"]))


def of_group(said: dict[str, Any], group: tuple[str, int]) -> list[dict[str, Any]]:
    """The rows of a group: dense and no context, then budgets from the largest, best first."""
    rows = [r for r in said["rows"] if (r["task"], r["context"]) == group]
    lines = [DENSE, NO_CONTEXT]
    return sorted(
        rows,
        key=lambda r: (
            lines.index(r["label"]) if r["label"] in lines else len(lines),
            -(r["budget"] or 1),
            -r["score"],
        ),
    )


def page(said: dict[str, Any], findings: str | None = None) -> str:
    """The text of the whole page.

    Args:
        said: the results.
        findings: the conclusions, in a person's words; None for findings.md.
    """
    rows = said["rows"]
    budgets = sorted({r["budget"] for r in rows if r["budget"]}, reverse=True)
    counts = sorted({r["samples"] for r in rows})
    contexts = sorted({r["context"] for r in rows if r["side"] == THEIRS})
    missing = [task for task in SCORES if task not in {r["task"] for r in rows}]
    head = HEAD.format(
        budgets=_listed([f"{b:g}" for b in budgets]),
        samples=" to ".join(map(str, counts)),
        missing=f" (and {_listed(missing)}, which was not run here)" if missing else "",
        beside=BESIDE.format(contexts=_listed([f"{n:,}" for n in contexts])) if contexts else "",
    )
    scores = "; ".join(f"**{t}**: {SCORES[t]}" for t in dict.fromkeys(r["task"] for r in rows))
    told = FINDINGS.read_text(encoding="utf-8") if findings is None else findings
    parts = [head, f"## What it says\n\n{told.strip()}\n"]
    parts += [_section(said, group) for group in groups(said)]
    parts += [METHOD.format(scores=scores), "\n".join(_about(said)) + "\n"]
    return "\n".join(parts)


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _about(said: dict[str, Any]) -> Iterator[str]:
    ours = said["about"][OURS]
    versions = ", ".join(f"{name} {number}" for name, number in ours["versions"].items())
    yield f"* {OURS}: {versions}; {ours['machine']}, {ours['date']}"
    if THEIRS in said["about"]:
        other = said["about"][THEIRS]
        names = (THEIRS, "torch", "transformers")
        yield f"* {THEIRS}: {', '.join(f'{n} {other[n]}' for n in names)}; {other['machine']}"


def _section(said: dict[str, Any], group: tuple[str, int]) -> str:
    task, context = group
    rows, unit = of_group(said, group), said["units"][task]
    told = list(map(_line, rows))
    # Not every task has every figure: columns that are empty in all rows are left out.
    shown = [at for at in range(len(COLUMNS)) if any(line[at] for line in told)]
    heads = [COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 2))]
    lines = [[line[at] for at in shown] for line in [*heads, *told]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    title = f"{task} at {context:,} tokens"
    figure = f"{FIGURES}/{figure_name(group)}"
    return f"## {title}\n\nScores in {unit}.\n\n![{title}: minus dense]({figure})\n\n{table}\n"


COLUMNS = (
    "library",
    "policy",
    "budget",
    "KV / dense",
    "score (95 %)",
    "minus dense (95 %)",
    "prefill s",
    "GFLOP",
    "tokens/s",
)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    label = row["label"].replace("|", "\\|")
    return (
        row["side"],
        label,
        "" if row["budget"] is None else f"{row['budget']:g}",
        f"{row['held_share']:.2f}",
        _span(row, "score", ".2f"),
        _span(row, "difference", "+.2f"),
        _number(row.get("prefill_seconds"), ".1f"),
        _number(row.get("prefill_flops"), ".0f", 1e9),
        _number(row.get("decode_tokens_per_second"), ".0f"),
    )


def _span(row: dict[str, Any], what: str, form: str) -> str:
    mean, low, high = (row[name] for name in (what, f"{what}_low", f"{what}_high"))
    if mean is None or low is None:
        return _number(mean, form)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else format(value / unit, form)


# The figures.


def figure_name(group: tuple[str, int]) -> str:
    """The file name of a group's figure."""
    return f"{group[0]}-{group[1]}.svg"


def drawn(said: dict[str, Any]) -> dict[str, str]:
    """An SVG for each task and context, by file name; on a dark screen it is dark."""
    return {figure_name(group): _figure(said, group) for group in groups(said)}


def _figure(said: dict[str, Any], group: tuple[str, int]) -> str:
    from matplotlib.lines import Line2D

    looks = _looks(said)
    rows = [r for r in of_group(said, group) if _name(r) in looks]
    there = set(map(_name, rows))
    labels = [label for label in looks if label in there]
    title = f"{group[0]}, {group[1]:,} tokens: minus dense, with 95 %"
    with look(figure_name(group)):
        legend = [(Line2D([], [], **looks[label]), label) for label in labels]
        figure, axes = canvas(title, 3.0, legend)
        axes.axhline(0, color=INK, linewidth=0.8)
        for label in labels:
            _series(axes, [r for r in rows if _name(r) == label], looks[label])
        unit = said["units"][group[0]]
        axes.set(xlabel="KV bytes held, of dense's", ylabel=f"minus dense, {unit}")
        axes.set_xlim(0, 1)
        return finished(figure, figure_name(group), title).svg


def _series(axes: Any, rows: list[dict[str, Any]], given: dict[str, Any]) -> None:
    """Draws a policy's budgets as a joined line, each budget with its interval."""
    rows = sorted(rows, key=lambda r: r["held_share"])
    axes.plot([r["held_share"] for r in rows], [r["difference"] for r in rows], **given)
    for r in rows:
        if r["difference_low"] is not None:
            ends = (r["difference_low"], r["difference_high"])
            axes.plot([r["held_share"]] * 2, ends, color=given["color"], linewidth=0.8)


def _looks(said: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The look of each policy and press in all figures; presses of kvpress are dashed."""
    shown = [r for r in said["rows"] if r["label"] not in (DENSE, NO_CONTEXT)]
    shown = [r for r in shown if r["difference"] is not None]
    return {
        name: {
            "color": style.colour,
            "marker": style.marker,
            "linestyle": "--" if name.startswith(THEIRS) else "-",
            "markersize": 5,
            "linewidth": 1.2,
        }
        for name, style in styles(list(dict.fromkeys(map(_name, shown)))).items()
    }


def _name(row: dict[str, Any]) -> str:
    return f"{row['side']} {row['label']}"


def read() -> dict[str, Any]:
    """The committed results."""
    said: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return said
