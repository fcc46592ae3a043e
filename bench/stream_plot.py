"""Makes the figure and the table of `bench.stream`, from one or more of its JSON files.

python -m bench.stream_plot docs/streams.json docs/streams.svg
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from .stream import perplexities


def paired(found: dict[str, Any], start: int, stop: int) -> tuple[float, float, int]:
    """The perplexity of StreamingLLM over that of re-computing, on the same tokens.

    Returns:
        the ratio, the standard error of its logarithm, and the number of tokens.
    """
    mine = found["losses"]["StreamingLLM"]
    apart: list[float] = []
    for at, values in found["losses"]["recomputed"]:
        if start <= at < stop:
            apart += [m - v for m, v in zip(mine[at:], values, strict=False)]
    error = statistics.stdev(apart) / len(apart) ** 0.5
    return math.exp(statistics.fmean(apart)), error, len(apart)


def table(found: dict[str, Any]) -> str:
    """A Markdown table with a line for each stretch of 1,000 tokens."""
    names = [n for n in found["losses"] if n != "recomputed"]
    columns = [perplexities(found["losses"][n]) for n in names]
    lines = [f"| tokens | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for i in range(max(map(len, columns))):
        cells = [f"{c[i]:.1f}" if i < len(c) else "" for c in columns]
        lines.append(f"| {i},001-{i + 1},000 | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], place: Path) -> None:
    """Draws perplexity by stretch, and the time of a step by depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(2, 1))
    for name, values in found["losses"].items():
        if name != "recomputed":
            shown = perplexities(values)
            left.plot([1000 * i + 500 for i in range(len(shown))], shown, label=name)
    blocks = [(at, statistics.fmean(v)) for at, v in found["losses"]["recomputed"]]
    # Each point is the mean of two chunks.
    pairs = [(blocks[i : i + 2]) for i in range(0, len(blocks) - 1, 2)]
    left.plot(
        [statistics.fmean(p[0] for p in pair) for pair in pairs],
        [math.exp(statistics.fmean(p[1] for p in pair)) for pair in pairs],
        ".", label="sliding window, re-computed (some chunks)", color="gray",
    )  # fmt: skip
    # The trained context.
    left.axvline(8192, linestyle=":", color="black")
    left.set(yscale="log", xlabel="tokens read", ylabel="perplexity of 1,000 tokens")
    left.legend(fontsize=8)
    for name, steps in found["step"].items():
        right.plot([int(n) for n in steps], [s["median"] for s in steps.values()], "o-", label=name)
    right.set(ylim=(0, None), xlabel="tokens read", ylabel="seconds of a step (median)")
    figure.tight_layout()
    figure.savefig(place)


def merged(files: list[str]) -> dict[str, Any]:
    """The results of several runs as one."""
    found: dict[str, Any] = {}
    for name in files:
        for key, value in json.loads(Path(name).read_text()).items():
            if key == "about":
                found.setdefault("about", []).extend(value if isinstance(value, list) else [value])
            else:
                found.setdefault(key, {}).update(value)
    return found


if __name__ == "__main__":
    result = merged(sys.argv[1:-1])
    print(table(result))
    for edges in ((0, 20_000), (0, 5000), (5000, 10_000), (10_000, 15_000), (15_000, 20_000)):
        ratio, error, tokens = paired(result, *edges)
        print(f"{edges}: {ratio:.4f} of re-computing, +- {error:.4f}, {tokens} tokens")
    draw(result, Path(sys.argv[-1]))
    Path(sys.argv[-1]).with_suffix(".json").write_text(json.dumps(result) + "\n")
