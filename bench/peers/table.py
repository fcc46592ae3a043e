"""Makes docs/peers.md from the results of both tasks.

python -m bench.peers.table bench/results docs/peers.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvprune.files import write_text

from .merge import REFERENCE
from .protocol import STEPS, WARM_UP_STEPS
from .rows import DENSE, OURS, THEIRS

INTRODUCTION = f"""# kvprune and kvpress, side by side

Made by `make peers` from `bench/results/peers-*.json`: the same model (SmolLM2-135M-Instruct,
float32, batch 1), token ids, budgets and measuring code. {THEIRS} needs an older transformers, so
that each library has an environment of its own, and every ratio is to the dense run (sdpa) of the
same environment.
"""

SPEED_TEXT = f"""## Speed and memory

In each turn all rows of a side run one after the other, dense first; the sides' turns alternate.
Seconds are medians; a ratio is that of one turn, given as median (least to most). A decode step is
the mean of {STEPS} after {WARM_UP_STEPS} untimed ones, on what the row holds of the prompt; dense
holds all of it. KV is the storage that the cache has allocated, after the prompt and after all
steps. Peak RSS is what reading the prompt adds at most to a process that has loaded the model and
read a short prompt; each row has a process of its own. SDTP has random heads here, of the shape of
those that ship. ObservedAttention needs eager attention, which its whole row runs with.
"""

FIELD_TEXT = f"""## Methods that both have

Measured as above, apart from it, and without processes of their own for the peaks. Policies of
{OURS} are as they come: TOVA evicts in each step, the others at the end of the prompt; presses of
{THEIRS} evict at the end of the prompt alone.
"""

QUALITY_TEXT = f"""## Quality

Negative log-likelihood of the gold answer's tokens, on SQuAD questions about contexts of 1,000 to
1,200 tokens that nothing was trained on. What was read is evicted from; the rest of the prompt and
the answer are then read on what is held. Differences are paired by question, with 95 % bootstrap
intervals; what they say is of these questions. "minus {REFERENCE}" is against that row of kvprune
at the same budget: above 0, the row is worse. SDTP has no budget: it follows its schedule.
"""

TITLES = {"speed": "speed and memory", "field": "methods that both have", "quality": "quality"}

WHERE = {
    "inside": "The question is part of what is evicted from (all of the prompt but its last token)",
    "after": "The context alone is evicted from, and the question read afterwards",
}


def document(results: dict[str, dict[str, Any]]) -> str:
    """The text of the page, for the tasks that there are results of."""
    parts = [INTRODUCTION, _versions(results)]
    for task, text in (("speed", SPEED_TEXT), ("field", FIELD_TEXT)):
        if task in results:
            rows = results[task]["rows"]
            lengths = dict.fromkeys(r["length"] for r in rows)
            parts += [text, *(_speed([r for r in rows if r["length"] == n]) for n in lengths)]
    if "quality" in results:
        rows = results["quality"]["rows"]
        groups = dict.fromkeys((r["asked"], r["share"]) for r in rows)
        parts += [QUALITY_TEXT, _dense_agreement(results["quality"]["lines"])]
        parts += [_quality([r for r in rows if (r["asked"], r["share"]) == g]) for g in groups]
    return "\n".join(parts)


def _versions(results: dict[str, dict[str, Any]]) -> str:
    said: dict[str, list[str]] = {}
    for task, result in results.items():
        for side, about in result["about"].items():
            line = (
                f"* {side} {about[side]}: transformers {about['transformers']}, torch "
                f"{about['torch']}, Python {about['python']}, {about['machine']}"
            )
            said.setdefault(line, []).append(TITLES[task])
    return "\n".join(f"{line} ({', '.join(tasks)})" for line, tasks in said.items()) + "\n"


def _speed(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    title = f"### {first['length']:,} tokens, {first['budget']:,} kept ({_turns(rows)})\n"
    header = ("library", "row", "prefill s", "/ dense", "decode ms", "/ dense", "KV MB", "/ dense")
    lines = [
        (
            row["side"],
            row["row"],
            f"{row['prefill']:.2f}",
            _ratio(row["prefill_ratio"]),
            f"{row['decode'] * 1e3:.1f}",
            _ratio(row["decode_ratio"]),
            _megabytes(row["held"], row["held_after"]),
            f"{row['held_share']:.2f}",
            _megabytes(row["beyond"]),
        )
        for row in rows
    ]
    return title + "\n" + _table((*header, "peak RSS, + MB"), lines)


def _turns(rows: list[dict[str, Any]]) -> str:
    counts = sorted({row["turns"] for row in rows})
    return f"turns: {' to '.join(map(str, counts))}"


def _quality(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    counts = sorted({row["questions"] for row in rows})
    title = (
        f"### {first['share']:.0%} kept, {' to '.join(map(str, counts))} questions\n\n"
        f"{WHERE[first['asked']]}.\n"
    )
    header = ("library", "row", "KV / dense", "NLL", "minus dense", f"minus {REFERENCE}")
    lines = [
        (
            row["side"],
            row["row"],
            f"{row['held_share']:.2f}",
            f"{row['nll']:.2f}",
            "-" if row["row"] == DENSE else _difference(row["minus_dense"]),
            "-" if row["row"] == REFERENCE else _difference(row["minus_reference"]),
        )
        for row in sorted(rows, key=lambda row: row["nll"])
    ]
    return title + "\n" + _table(header, lines)


def _dense_agreement(lines: list[dict[str, Any]]) -> str:
    """A line on how far the two dense models are apart: a check that both read the same."""
    dense = {(e["side"], e["asked"], e["number"]): e["nll"] for e in lines if e["row"] == DENSE}
    apart = [
        abs(nll - dense[THEIRS, asked, number])
        for (side, asked, number), nll in dense.items()
        if side == OURS and (THEIRS, asked, number) in dense
    ]
    if not apart:
        return ""
    return (
        f"The dense models of the two environments differ by at most {max(apart):.1e} on any of "
        f"the {len(apart)} questions.\n"
    )


def _ratio(said: list[float]) -> str:
    median, least, most = said
    return f"{median:.2f} ({least:.2f} to {most:.2f})"


def _difference(said: list[float] | None) -> str:
    if said is None:
        return "-"
    mean, low, high = said
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def _megabytes(*numbers: int | None) -> str:
    known = ["-" if n is None else f"{n / 1e6:.1f}" for n in numbers]
    return " / ".join(dict.fromkeys(known))


def _table(header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    rule = ("---", "---", *["---:"] * (len(header) - 2))
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *lines])


def write(results: Path, out: Path) -> None:
    """Writes the page from the results that lie in a folder.

    Raises:
        KVPruneError: the file cannot be written.
    """
    files = {task: results / f"peers-{task}.json" for task in ("speed", "field", "quality")}
    found = {task: json.loads(f.read_text()) for task, f in files.items() if f.exists()}
    write_text(out, document(found))


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
