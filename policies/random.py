"""Random: slots that stay by chance, the baseline that every method has to beat.

The chance is a hash of the token's number in its row, its head among all heads, the layer and the
seed. So rows stay independent, padding changes nothing, a slot has the same chance in each later
turn, and nothing is drawn from a generator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvprune.errors import KVPruneError
from kvprune.policy import OneBudget, Ranking, SlotView


@dataclass(frozen=True, repr=False)
class Random(OneBudget):
    """Keeps slots by chance, per key/value head.

    Args:
        budget: what a layer keeps; tokens (int) or a share of the prompt (float).
        seed: other numbers keep other slots.
        when: see `TokenPolicy`; by default at the end of each prompt.
        layers: the layers that the policy works on; None for all.

    Raises:
        KVPruneError: a budget that is not positive, NaN or, as a float, above 1.0; a seed that is
            not a whole number from 0 to 2 ** 31.
    """

    seed: int = 0
    when: int | str | None = field(default="prompt", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.seed) is not int or not 0 <= self.seed <= 2**31:
            raise KVPruneError(
                f"Random: seed={self.seed!r}: expected a whole number from 0 to 2 ** 31"
            )

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Ranks slots by a hash."""
        heads = torch.arange(slots.heads, device=slots.columns.device)
        heads = (heads + slots.first_head)[:, None]
        number = _mixed(_mixed(_mixed(heads + self.seed * 2**31) + slots.layer) + slots.positions)
        # The upper bits, as many as float64 holds.
        score = (number >> 11).double()
        return Ranking(score, torch.zeros_like(slots.valid), slots.tokens(self.budget))


def _mixed(number: Tensor) -> Tensor:
    """SplitMix64 (Steele, Lea and Flood 2014), in int64, which wraps around."""
    number = number + _signed(0x9E3779B97F4A7C15)
    number = (number ^ _shifted(number, 30)) * _signed(0xBF58476D1CE4E5B9)
    number = (number ^ _shifted(number, 27)) * _signed(0x94D049BB133111EB)
    return number ^ _shifted(number, 31)


def _shifted(number: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (number >> bits) & (2 ** (64 - bits) - 1)


def _signed(number: int) -> int:
    return number - 2**64
