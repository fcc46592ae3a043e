"""FLOPs of reading a prompt, counted alike for every policy.

torch's `FlopCounterMode` cannot be used as it is: it does not know the kernel that CPUs use for
sdpa (which would make dense attention free), and H2O's block-wise attention skips what a query
cannot see while it counts a fused kernel as if nothing were skipped. So a layer costs
`linear * Q + attention * Q ** 2` for the Q tokens that enter it, whatever computes its attention,
and the two constants of each layer are measured with that counter on the dense model. That is what
the counter says of the dense model, in full: twice what causal attention needs at the least.

What policies compute themselves is not counted. Only what the counter knows is, matrix products
above all: no softmax, no norm, no sorting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kvprune.cache import ComposedCache
from kvprune.families import base_of, decoder_layers, unwrapped

LENGTHS = (64, 128)
"""Tokens of the two prompts that are measured; linear attention works in chunks of 64."""

_SDPA_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def layers_of(model: Any) -> Sequence[nn.Module]:
    """The decoder layers of an attached model, in order."""
    return decoder_layers(base_of(unwrapped(model)))


@dataclass(frozen=True)
class Flops:
    """What a model's parts cost, in FLOPs.

    linear, attention: by layer, for each token, and for each pair of tokens.
    each, once: of what is not in the layers, for each token of the prompt, and once.
    """

    linear: tuple[float, ...]
    attention: tuple[float, ...]
    each: float
    once: float

    @classmethod
    def measured(cls, model: Any) -> Flops:
        """Of an attached model, from two short prompts."""
        short, long = (_by_layer(model, n) for n in LENGTHS)
        ratio, n = LENGTHS[1] / LENGTHS[0], LENGTHS[0]
        pairs = [
            (b - ratio * a) / (n * n * ratio * (ratio - 1))
            for a, b in zip(short, long, strict=True)
        ]
        tokens = [a / n - c * n for a, c in zip(short, pairs, strict=True)]
        each = (long[-1] - short[-1]) / (LENGTHS[1] - n)
        return cls(tuple(tokens[:-1]), tuple(pairs[:-1]), each, short[-1] - each * n)

    def of_prompt(self, tokens: int, entered: Sequence[int]) -> float:
        """Of reading a prompt by itself, with one token's logits.

        Args:
            tokens: of the prompt.
            entered: how many of them entered each layer.
        """
        layers = zip(self.linear, self.attention, entered, strict=True)
        return sum(b * q + c * q * q for b, c, q in layers) + self.each * tokens + self.once


def _by_layer(model: Any, tokens: int) -> list[float]:
    """Of each layer of the dense model; last, of all that is in none."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    counted: list[float] = []
    with _each_counted(layers_of(model), counted), counting() as counter, torch.no_grad():
        model(ids, past_key_values=ComposedCache(), logits_to_keep=1)
    return [*counted, counter.get_total_flops() - sum(counted)]


def counting() -> FlopCounterMode:
    """torch's counter, with the kernel that it does not know."""
    return FlopCounterMode(display=False, custom_mapping={_SDPA_ON_CPU: _sdpa_flops})


def _sdpa_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Of the shapes `(B, Hq, Q, D)`, `(B, Hkv, S, D)`, `(B, Hkv, S, Dv)`."""
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


@contextmanager
def _each_counted(modules: Sequence[nn.Module], counted: list[float]) -> Iterator[None]:
    """Appends what each module's forward costs."""
    counters: list[FlopCounterMode] = []

    def begin(*_: Any) -> None:
        counters.append(counting().__enter__())

    def end(*_: Any) -> None:
        counter = counters.pop()
        counter.__exit__(None, None, None)
        counted.append(counter.get_total_flops())

    handles = [m.register_forward_pre_hook(begin) for m in modules]
    handles += [m.register_forward_hook(end) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
