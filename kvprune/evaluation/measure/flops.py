"""FLOPs of reading a prompt, counted alike for every policy.

torch's `FlopCounterMode` cannot be used as it is: it does not know the kernel that CPUs use for
sdpa (which would make dense attention free), and H2O's block-wise attention skips what a query
cannot see while it counts a fused kernel as if nothing were skipped. So a layer costs
`linear * Q + attention * Q * S` for the Q tokens that enter it and the S slots that it then has,
whatever computes its attention, and the two constants of each layer are measured with that counter
on the dense model. That is what the counter says of the dense model, in full: twice what causal
attention needs at the least.

What policies compute themselves (SDTP's heads) is counted by `own_flops` and comes on top. Only
what the counter knows is counted, matrix products above all: no softmax, no norm, no sorting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...cache.composed import ComposedCache
from ...engine.survivors import metered
from ...models.devices import device_of
from ...models.structure import base_of, decoder_layers, unwrapped

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
        n, m = LENGTHS
        both = list(zip(short, long, strict=True))
        # a = linear * n + attention * n ** 2, and b the same of m.
        attention = [(b / m - a / n) / (m - n) for a, b in both[:-1]]
        linear = [a / n - c * n for (a, _), c in zip(both[:-1], attention, strict=True)]
        each = (long[-1] - short[-1]) / (m - n)
        return cls(tuple(linear), tuple(attention), each, short[-1] - each * n)

    def of_prompt(
        self, tokens: int, entered: Sequence[int], slots: Sequence[int] | None = None
    ) -> float:
        """Of a forward of a prompt, or of the last part of one, with one token's logits.

        Args:
            tokens: of the forward.
            entered: how many of them entered each layer.
            slots: how many slots each layer has in use then, with these; None for these alone.
        """
        seen = entered if slots is None else slots
        layers = zip(self.linear, self.attention, entered, seen, strict=True)
        return sum(b * q + c * q * s for b, c, q, s in layers) + self.each * tokens + self.once


def _by_layer(model: Any, tokens: int) -> list[float]:
    """Of each layer of the dense model; last, of all that is in none."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device_of(model))
    meter = _Meter()
    with meter.on(layers_of(model)), counting() as counter, torch.no_grad():
        model(ids, past_key_values=ComposedCache(), logits_to_keep=1)
    return [*meter.counted, counter.get_total_flops() - sum(meter.counted)]


class _Meter:
    """Counts each module's forward."""

    def __init__(self) -> None:
        self.counted: list[float] = []
        self._open: FlopCounterMode | None = None

    def _start(self, *_: Any) -> None:
        self._open = counting()
        self._open.__enter__()

    def _stop(self, *_: Any) -> None:
        counter, self._open = self._open, None
        assert counter is not None
        counter.__exit__(None, None, None)
        self.counted.append(counter.get_total_flops())

    @contextmanager
    def on(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """In forwards inside the context."""
        hooks = [m.register_forward_pre_hook(self._start) for m in modules]
        hooks += [m.register_forward_hook(self._stop) for m in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if self._open is not None:
                # An error came in between: torch would go on counting.
                self._stop()


def counting() -> FlopCounterMode:
    """torch's counter, with the kernel that it does not know."""
    return FlopCounterMode(display=False, custom_mapping={_SDPA_ON_CPU: _attention})


def _attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Two products over all pairs of a query `[B, Hq, Q, D]` and a slot, as for any other sdpa."""
    rows, heads, count, size = query
    return 2 * rows * heads * count * key[2] * (size + value[3])


@contextmanager
def own_flops() -> Iterator[list[float]]:
    """The FLOPs of each answer of a policy, in forwards inside the context.

    Of every cache and in every thread. Slow, as the counter is: not for a forward that is timed.
    """
    counted: list[float] = []

    @contextmanager
    def meter() -> Iterator[None]:
        with counting() as counter:
            yield
        counted.append(counter.get_total_flops())

    with metered(meter):
        yield counted
