"""FLOPs of reading a prompt, counted alike for every policy.

torch's `FlopCounterMode` cannot be used as it is, for two reasons. It does not know the kernel that
CPUs use for sdpa, which would make dense attention free. And it counts a fused kernel as if nothing
were skipped, while block-wise attention (`attention/blockwise.py`), which H2O needs, skips what a
query cannot see. So a layer costs `linear * Q + attention * Q * S`, for the Q tokens that enter it
and the S slots that it then has, whatever computes its attention. The two constants of each layer
are measured with torch's counter on the dense model. So the cost of the dense model is all that the
counter says: twice what causal attention needs at the least.

The computations of policies themselves (SDTP's heads) are counted by `own_flops` and come on top.
Only the operations that the counter knows are counted, matrix products above all: no softmax, no
norm, no sorting.
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
"""The tokens of the two prompts that are measured; linear attention works in chunks of 64."""

_SDPA_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def layers_of(model: Any) -> Sequence[nn.Module]:
    """The decoder layers of an attached model, in order."""
    return decoder_layers(base_of(unwrapped(model)))


@dataclass(frozen=True)
class Flops:
    """The costs of a model's parts, in FLOPs.

    Attributes:
        linear: for each layer, the cost of each token.
        attention: for each layer, the cost of each pair of a token and a slot.
        each: outside the layers, the cost of each token of the prompt.
        once: outside the layers, the cost of a forward whatever its length.
    """

    linear: tuple[float, ...]
    attention: tuple[float, ...]
    each: float
    once: float

    @classmethod
    def measured(cls, model: Any) -> Flops:
        """Measures an attached model with two short prompts."""
        short, long = (_by_layer(model, n) for n in LENGTHS)
        n, m = LENGTHS
        both = list(zip(short, long, strict=True))
        # a = linear * n + attention * n ** 2, and b is the same with m.
        attention = [(b / m - a / n) / (m - n) for a, b in both[:-1]]
        linear = [a / n - c * n for (a, _), c in zip(both[:-1], attention, strict=True)]
        each = (long[-1] - short[-1]) / (m - n)
        return cls(tuple(linear), tuple(attention), each, short[-1] - each * n)

    def of_prompt(
        self, tokens: int, entered: Sequence[int], slots: Sequence[int] | None = None
    ) -> float:
        """The FLOPs of a forward of a prompt, or of its last part, with the logits of one token.

        Args:
            tokens: the number of tokens in the forward.
            entered: for each layer, how many of these tokens enter it.
            slots: for each layer, how many slots are then in use, these tokens included; None if
                the layers hold these tokens alone.
        """
        seen = entered if slots is None else slots
        layers = zip(self.linear, self.attention, entered, seen, strict=True)
        return sum(b * q + c * q * s for b, c, q, s in layers) + self.each * tokens + self.once


def _by_layer(model: Any, tokens: int) -> list[float]:
    """The FLOPs of each layer of the dense model; last, the FLOPs of all that is in no layer."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device_of(model))
    meter = _Meter()
    with meter.on(layers_of(model)), counting() as counter, torch.no_grad():
        model(ids, past_key_values=ComposedCache(), logits_to_keep=1)
    return [*meter.counted, counter.get_total_flops() - sum(meter.counted)]


class _Meter:
    """Counts the FLOPs of each module's forward."""

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
        """Counts in forwards inside the context."""
        hooks = [m.register_forward_pre_hook(self._start) for m in modules]
        hooks += [m.register_forward_hook(self._stop) for m in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if self._open is not None:
                # An error ended a module's forward, so its hook was not called: torch would go on
                # counting.
                self._stop()


def counting() -> FlopCounterMode:
    """torch's counter, with the kernel that it does not know."""
    return FlopCounterMode(display=False, custom_mapping={_SDPA_ON_CPU: _attention})


def _attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """The FLOPs of attention, as torch counts any other sdpa kernel.

    They are those of two products over all pairs of a query `[B, Hq, Q, D]` and a slot.
    """
    rows, heads, count, size = query
    return 2 * rows * heads * count * key[2] * (size + value[3])


@contextmanager
def own_flops() -> Iterator[list[float]]:
    """The FLOPs of each answer of a policy, in forwards inside the context.

    Answers count whatever their cache and their thread. The counter is slow: do not time such a
    forward.
    """
    counted: list[float] = []

    @contextmanager
    def meter() -> Iterator[None]:
        with counting() as counter:
            yield
        counted.append(counter.get_total_flops())

    with metered(meter):
        yield counted
