"""The number of layers in which each token survives, as coloured text or as a page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ..cache.composed import ComposedCache
from ..errors import KVPruneError
from ..models.devices import device_of
from ..policy.base import TokenPolicy
from .measure.reading import longest_of, read_prompt


@dataclass(frozen=True)
class Explanation:
    """The number of layers that hold each token of a prompt at the end.

    Attributes:
        tokens: the texts of the n tokens.
        layers: for each token, how many layers hold it. A layer counts by the share of its
            key/value heads that hold the token.
        num_layers: how many layers of the model hold slots.
        policies: the policies that decided, as text.
    """

    tokens: tuple[str, ...]
    layers: tuple[float, ...]
    num_layers: int
    policies: str


def explain(model: Any, tokenizer: Any, text: str, policies: Sequence[TokenPolicy]) -> Explanation:
    """Reads a text (see `measure/reading.py`) and counts the layers that still hold each token.

    Args:
        model: an attached model.
        tokenizer: the model's tokenizer, a fast one.
        text: the text to read. The special tokens with which the tokenizer begins a text are added,
            a chat template is not.
        policies: a pipeline as for `ComposedCache`.

    Raises:
        KVPruneError: an empty text, a text longer than the model was made for, a slow tokenizer, or
            policies that do not work on the model.
    """
    if not tokenizer.is_fast:
        raise KVPruneError("explain: expected a fast tokenizer, which knows where tokens begin")
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    if not ids:
        raise KVPruneError("explain: expected a text of at least one token, got an empty one")
    longest = longest_of(model)
    if longest and len(ids) > longest:
        raise KVPruneError(
            f"explain: expected a text of at most the {longest} tokens that the model was made "
            f"for, got {len(ids)}. Give a part of the text"
        )
    cache = ComposedCache([policy.for_tokenizer(tokenizer) for policy in policies])
    read_prompt(model, cache, torch.tensor([ids], device=device_of(model)))
    return explained(cache, pieces(text, spans))


def explained(cache: ComposedCache, texts: Sequence[str]) -> Explanation:
    """The explanation of the first tokens that a cache of one row has read, by their texts."""
    held = torch.zeros(len(texts), dtype=torch.double)
    # Layers of hybrid models that keep a state hold no slots, and are left out.
    layers = [index for index, _ in cache.slot_layers()]
    for layer in layers:
        columns = cache.columns(layer)[0].cpu()
        mine = columns[(columns >= 0) & (columns < len(texts))]
        held += torch.bincount(mine, minlength=len(texts)) / len(columns)
    # So that a token that all layers hold is held by a whole number of layers.
    shares = tuple(round(float(each), 6) for each in held)
    return Explanation(tuple(texts), shares, len(layers), repr(list(cache.policies)))


def pieces(text: str, spans: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """The texts of the tokens, cut from the whole text; joined, they are the whole text.

    Characters between two tokens go to the second one. The text of a special token is empty, as it
    has no place in the whole text.

    Args:
        text: the whole text.
        spans: for each token, the places in the text where it begins and ends.
    """
    ends = list(accumulate((end for _, end in spans), max))
    ends[-1] = len(text)
    return tuple(text[a:b] for a, b in pairwise([0, *ends]))


SHADES = 5
"""The number of steps in the colour scale: a reader cannot tell more of them apart."""

_TERMINAL = ("grey30", "grey50", "grey70", "bold white on dark_green", "bold black on green3")


def _shade(held: float, num_layers: int) -> int:
    """The shade of a token: 0 for the first tokens to go, SHADES - 1 if every layer holds it."""
    if held == num_layers:
        return SHADES - 1
    return min(int(held * (SHADES - 1) // num_layers), SHADES - 2)


_PLAIN = 3
"""The least shade that stands in brackets where there is no colour."""


def as_terminal(explained: Explanation, colour: bool = True) -> Text:
    """The explanation for rich: dark for tokens that left early, green if most layers hold them.

    Args:
        explained: what is to be shown.
        colour: whether there is colour, or what most layers hold stands in brackets: `[...]`.
    """
    text = Text()
    shades = [_shade(held, explained.num_layers) for held in explained.layers]
    before = False
    for token, shade in zip(explained.tokens, shades, strict=True):
        held = shade >= _PLAIN
        if not colour and held != before:
            text.append("[" if held else "]")
        text.append(token, style=_TERMINAL[shade] if colour else "")
        before = held
    text.append("]" if before and not colour else "")
    text.append("\n\n" + _caption(explained) + "\n")
    if not colour:
        most = [
            n for n in range(explained.num_layers + 1) if _shade(n, explained.num_layers) >= _PLAIN
        ]
        text.append(f"In brackets: in {most[0]} layers or more.")
        return text
    for shade, style in enumerate(_TERMINAL):
        text.append(f" {_range(shade, explained.num_layers)} ", style=style)
        text.append(" ")
    return text


def has_colour(console: Console) -> bool:
    """Whether what is printed there may rely on colours: not into a pipe, nor with NO_COLOR."""
    return console.is_terminal and not console.no_color


def _range(shade: int, num_layers: int) -> str:
    """The numbers of layers that a shade stands for; "-" for a shade that no token can have."""
    counts = [n for n in range(num_layers + 1) if _shade(n, num_layers) == shade]
    if not counts:
        return "-"
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    return f"{span} layers"


def _caption(explained: Explanation) -> str:
    whole = sum(n == explained.num_layers for n in explained.layers)
    if whole == len(explained.layers):
        return f"{explained.policies}: nothing is dropped from these {whole} tokens"
    mean = sum(explained.layers) / len(explained.layers) / explained.num_layers
    return (
        f"{len(explained.tokens)} tokens, {explained.num_layers} layers, {explained.policies}: "
        f"{whole} tokens are in every layer, {mean:.0%} of all slots are held"
    )


def as_page(explained: Explanation) -> str:
    """The explanation as a self-contained HTML page; tooltips say how many layers hold a token."""
    spans = "".join(
        f'<span class="s{_shade(held, explained.num_layers)}" title="held by {held:.3g} of '
        f'{explained.num_layers} layers">{html.escape(token)}</span>'
        for token, held in zip(explained.tokens, explained.layers, strict=True)
    )
    key = "".join(
        f'<span class="s{s}">{_range(s, explained.num_layers)}</span> ' for s in range(SHADES)
    )
    caption = html.escape(_caption(explained))
    return _PAGE.format(caption=caption, key=key, text=spans)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kvprune explain</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; }}
body {{ padding: 0 1rem; }}
pre {{ font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; }}
p {{ font-size: 0.9rem; }}
span {{ border-radius: 0.2em; }}
.s0 {{ opacity: 0.35; text-decoration: line-through; }}
.s1 {{ opacity: 0.5; }}
.s2 {{ opacity: 0.75; }}
.s3 {{ background: rgb(46 160 67 / 0.25); }}
.s4 {{ background: rgb(46 160 67 / 0.55); }}
@media print {{ span {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }} }}
</style></head>
<body><p>{caption}</p><p>{key}</p><pre>{text}</pre></body></html>
"""
