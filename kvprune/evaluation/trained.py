"""The page at the end of `kvprune train-saliency`: what heads recover, in words and a plot."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..policies import Saliency
from .measure.flops import Flops
from .measure.reader import own_prefill_flops
from .report.palette import GRID, GROUND, INK, MUTED, PAPER, SERIES
from .report.statistics import interval

WIDTH, ROW, LEFT, TOP = 640, 30, 150, 24
"""Of the plot, in pixels; a row for each share and kind."""


def flops_of_scores(model: Any, policy: Saliency, prompt: Sequence[int]) -> float:
    """The FLOPs of the heads' scores of a prompt, over those of reading it."""
    count = len(prompt)
    flops = Flops.measured(model)
    dense = flops.of_prompt(count, [count] * len(flops.linear))
    return own_prefill_flops(model, prompt, [policy]) / dense


def in_words(account: Mapping[str, Any], flops: float) -> str:
    """What was measured, one sentence for each share.

    Args:
        account: what `train_saliency` wrote.
        flops: see `flops_of_scores`.
    """
    lost, sentences = _lost(account), []
    for share in account["shares"]:
        mine, chance = fmean(lost[f"saliency {share}"]), fmean(lost[f"random {share}"])
        low, high = interval(lost[f"saliency {share}"])
        # One example has no interval.
        span = f" ({low:.2f} to {high:.2f})" if low == low else ""
        sentence = (
            f"With {share:.3g} of a prompt's slots ({share * account['prompt_tokens']:.0f} of "
            f"{account['prompt_tokens']:.0f} tokens), completions lose {mine:.2f} nats a token"
            f"{span} against the dense model, and {chance:.2f} where slots stay by chance"
        )
        if chance > 0:
            sentence += f": {1 - mine / chance:.0%} of that is recovered"
        sentences.append(sentence + ".")
    return " ".join(
        [
            *sentences,
            f"Scores cost {flops:.1%} of the FLOPs of reading a prompt. {account['held_out']} "
            f"examples were measured, of which nothing was learned; {account['examples']} were "
            f"learned from.",
        ]
    )


def as_page(account: Mapping[str, Any], flops: float, model: str) -> str:
    """The page, self-contained.

    Args:
        account, flops: see `in_words`.
        model: its name.
    """
    said = in_words(account, flops)
    return _PAGE.format(
        title=html.escape(f"Heads for Saliency on {model}"),
        words="".join(f"<p>{html.escape(s)}</p>" for s in said.replace(". ", ".\n").split("\n")),
        plot=_plot(account),
    )


def _lost(account: Mapping[str, Any]) -> dict[str, list[float]]:
    """By run, what each example lost against the dense model."""
    each = account["each"]
    return {
        name: [mine - dense for mine, dense in zip(found, each["dense"], strict=True)]
        for name, found in each.items()
        if name != "dense"
    }


def _plot(account: Mapping[str, Any]) -> str:
    """A point with its interval for each run; the further to the left the better."""
    lost = _lost(account)
    spans = {name: (fmean(values), *interval(values)) for name, values in lost.items()}
    # One value has no interval.
    numbers = [n for span in spans.values() for n in span if n == n]
    low, high = min(0.0, *numbers), max(0.1, *numbers)

    def at(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 60)

    height = TOP + ROW * len(spans) + 30
    parts = [
        f'<line x1="{at(0):.1f}" x2="{at(0):.1f}" y1="{TOP - 8}" y2="{height - 28}" class="axis"/>',
        f'<text x="{at(0):.1f}" y="{height - 10}" class="muted" text-anchor="middle">dense</text>',
        f'<text x="{WIDTH - 8}" y="{height - 10}" class="muted" text-anchor="end">nats a token lost'
        f"</text>",
    ]
    for number, (name, (mean, left, right)) in enumerate(spans.items()):
        y, kind = TOP + ROW * number + ROW / 2, name.partition(" ")[0]
        parts.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{name}</text>')
        if left == left:
            parts.append(
                f'<line x1="{at(left):.1f}" x2="{at(right):.1f}" y1="{y}" y2="{y}" class="{kind}"/>'
            )
        parts.append(f'<circle cx="{at(mean):.1f}" cy="{y}" r="5" class="{kind}"/>')
        end = max(mean, right) if right == right else mean
        parts.append(f'<text x="{at(end) + 10:.1f}" y="{y + 4}">{mean:.2f}</text>')
    label = html.escape("; ".join(f"{name}: {span[0]:.2f}" for name, span in spans.items()))
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="nats a token lost: {label}">'
        + "".join(parts)
        + "</svg>"
    )


_BLUE, _ORANGE = list(SERIES.items())[:2]
_PAGE = (
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; }}
body {{ padding: 0 1rem; }}
svg {{ width: 100%; height: auto; }}
"""
    + "".join(
        f"{start}body {{{{ color: {ink}; background: {paper}; }}}}\n"
        f"text {{{{ font: 13px system-ui, sans-serif; fill: {ink}; }}}}\n"
        f".muted {{{{ fill: {muted}; }}}} .axis {{{{ stroke: {grid}; }}}}\n"
        f".saliency {{{{ stroke: {blue}; fill: {blue}; stroke-width: 3; }}}}\n"
        f".random {{{{ stroke: {orange}; fill: {orange}; stroke-width: 3; }}}}\n{end}"
        for start, end, ink, paper, muted, grid, blue, orange in (
            ("", "", INK, PAPER, MUTED, GRID, _BLUE[0], _ORANGE[0]),
            (
                "@media (prefers-color-scheme: dark) {{\n",
                "}}\n",
                *(GROUND[each] for each in (INK, PAPER, MUTED, GRID)),
                _BLUE[1],
                _ORANGE[1],
            ),
        )
    )
    + """</style></head>
<body><h1>{title}</h1>{words}{plot}</body></html>
"""
)
