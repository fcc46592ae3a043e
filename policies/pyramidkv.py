"""PyramidKV (arXiv 2406.02069): SnapKV with more slots in the first layers than in the last ones.

Of the budget without the window, C, the last layer gets C / beta and the first one 2C - C / beta;
between them budgets fall linearly, so that their mean is C.

Where the sources differ:

* The paper's code gives a layer that many slots beside the window; here, as in SnapKV, the budget
  counts the window.
* No layer can keep more than was read. Where the first layer would, it keeps all, and the
  last one so much more that the mean is still the budget that was asked for, at every share.
  (kvpress falls back to the same budget everywhere, also where the last layer would keep less than
  the window.)
* Budgets are whole numbers whose sum over the layers is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.errors import KVPruneError
from kvprune.policy import SlotView

from .snapkv import SnapKV


@dataclass(frozen=True, repr=False)
class PyramidKV(SnapKV):
    """Keeps what SnapKV keeps, by budgets that fall from layer to layer.

    Args:
        budget: what a layer keeps in all, the window included, as the mean over the layers; tokens
            (int) or a share of the prompt (float).
        window: see `SnapKV`.
        kernel: see `SnapKV`.
        pooling: see `SnapKV`.
        when: see `TokenPolicy`; by default at the end of each prompt.
        beta: how many times the budget's mean is that of the last layer, the window left out.
        layers: the layers that the policy works on; None for all. Budgets fall over these.

    Raises:
        KVPruneError: an error of `SnapKV`, or a beta below 1.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool)
        if not number or not 1 <= self.beta < float("inf"):
            raise KVPruneError(f"PyramidKV: beta={self.beta!r}: expected a number of at least 1")

    def _budget(self, slots: SlotView) -> Tensor:
        """`[B]` tokens of this layer."""
        mean = slots.tokens(self.budget)
        among: Sequence[int] = range(slots.num_layers)
        if self.layers is not None:
            among = sorted(self.layers)
        steps, place = len(among) - 1, list(among).index(slots.layer)
        room = (mean - self.window).double()
        if steps == 0:
            return mean
        read = slots.positions.amax((1, 2)) + 1
        most = torch.minimum(2 * room - room / self.beta, read - self.window)
        slope = 2 * (most - room) / steps

        def whole(layers: int) -> Tensor:
            """The budgets of the first so many layers together, halves up."""
            exact = layers * (most + self.window) - slope * (layers * (layers - 1) / 2)
            # What rounding left of a half counts as one.
            return (exact + 0.5 + 1e-6).floor().long()

        return torch.where(room > 0, whole(place + 1) - whole(place), mean)
