"""Writes docs/performance.md from what `bench.speed` measured: no number is written by hand.

python -m bench.performance
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvprune.files import write_text

from .costs import bars, pictures, results, tables
from .costs.plan import Sizes
from .costs.results import Found

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"

HEAD = """# Performance

Each candidate against the dense model in the same process, in turns. Ratios are medians over the
turns, each to the dense run of its own turn; in brackets the least and the most of them, of ten or
more the middle half. *FLOPs to dense* is what prefill could come down to, counted alike for all
(`kvprune/evaluation/measure/flops.py`); *counted TFLOP* is what torch's counter says of the same
run, which leaves out what H2O's blocks do not compute. *Live MB* is the most that tensors beyond
the weights held at once while the prompt was read, counted with H2O's blocks one after the other
(each thread beyond the first adds the scores of one block), *peak MB* what the process grew by.
SDTP has random heads here, of the shape of those that ship. Policies with a budget keep an eighth
of a prompt unless something else is said. A step of a policy that is asked every 64 tokens is the
mean of 64; it keeps 32 slots fewer, and so holds as many as the others in the mean. This page is
made by `python -m bench.performance` from `bench/results/speed-*.json`, which `make speed`
measures. The same of kvpress, beside this, is on [a page of its own](peers.md).
"""
NOTHING = "\nNothing has been measured with this version yet.\n"

SECTIONS = {
    "prefill": ("Prefill", ("prefill",)),
    "field": ("Methods of the field", ("field",)),
    "decode": ("Decoding", ("decode", "field-step")),
    "whole": ("End to end", ("whole",)),
    "stream": ("How costs grow", ("stream",)),
    "attach": ("What `attach` costs", ("attach",)),
    "others": ("Other precisions, batches and shapes", ("bfloat16", "batch", "layer")),
}

TABLES = {
    "prefill": tables.of_prefill,
    "field": tables.of_prefill,
    "decode": tables.of_decode,
    "field-step": tables.of_decode,
    "whole": tables.of_whole,
    "stream": tables.of_stream,
    "attach": tables.of_attach,
}


def page(found: list[Found]) -> str:
    """The text of the page; `found` is what `results.read` returns."""
    if not found:
        return HEAD + NOTHING
    told = [_bars(found), _pictures(found)]
    return HEAD + "".join(told + [_section(found, *said) for said in SECTIONS.values()])


def _bars(found: list[Found]) -> str:
    """The section on the bars, which also names the parts that were not measured yet."""
    there = {one["part"]["name"] for one in found}
    missing = [part.name for part in Sizes().parts() if part.name not in there]
    more = f"\nNot measured yet: {', '.join(missing)}.\n" if missing else ""
    return f"\n## What it has to reach\n\n{tables.of_bars(bars.bars(found))}{more}"


def _pictures(found: list[Found]) -> str:
    lines = [f"![{said}](performance/{name}.svg)\n" for name, said, _ in pictures.pictures(found)]
    return "".join(f"\n{line}" for line in lines)


def _section(found: list[Found], title: str, groups: tuple[str, ...]) -> str:
    parts = results.groups(found, *groups)
    told = [f"\n{tables.title(one)}\n{TABLES[one['part']['kind']](one)}" for one in parts]
    return f"\n## {title}\n{''.join(told)}" if told else ""


def write(found: list[Found], place: Path) -> None:
    """Writes the page and, in a folder beside it, its pictures; removes pictures without results.

    Raises:
        KVPruneError: a file cannot be written.
    """
    folder = place.parent / "performance"
    drawn = {f"{name}.svg": svg for name, _, svg in pictures.pictures(found)}
    for old in folder.glob("*.svg"):
        if old.name not in drawn:
            old.unlink()
    if drawn:
        folder.mkdir(parents=True, exist_ok=True)
    for name, svg in drawn.items():
        write_text(folder / name, svg)
    write_text(place, page(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args()
    write(results.read(asked.results), asked.page)


if __name__ == "__main__":
    main()
