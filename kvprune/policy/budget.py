"""Amounts of tokens: what a policy's budget is in each row."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import KVPruneError
from ..models.devices import in_memory
from .stored import newly_counted


class Lengths:
    """The number of tokens of each row, which shares are shares of.

    Read off the device once, so that no layer and no step waits for it again.

    Args:
        tensor: `[B]` int64.
        ends: its least and its most, where they are known.
    """

    def __init__(self, tensor: Tensor, ends: tuple[int, int] | None = None) -> None:
        self.tensor = tensor
        if ends is None:
            ends = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
        self._ends = ends
        # By an amount's repr: 1 is a token, 1.0 is all of them.
        self._known: dict[str, tuple[Tensor, tuple[int, int]]] = {}
        self._below: dict[int, Lengths] = {}
        self._elsewhere: dict[torch.device, Lengths] = {}

    def on(self, device: torch.device) -> Lengths:
        """The same on a device; for a model on several, once for each."""
        if self.tensor.device == device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Lengths(self.tensor.to(device), self._ends)
        return self._elsewhere[device]

    def tokens(self, amount: int | float) -> Tensor:
        """An amount, as of a `Budget`, in tokens of each row, `[B]` int64; read only."""
        return self._of(amount)[0]

    def shared(self) -> list[tuple[str, Tensor]]:
        """The answers of `tokens` so far, by amount, which all layers and steps share."""
        return [(amount, tensor) for amount, (tensor, _) in self._known.items()]

    def below(self, times: int) -> Lengths:
        """The lengths of the same rows, `times` copies below each other."""
        if times not in self._below:
            self._below[times] = _Below(self, times)
        return self._below[times]

    def ends(self, amount: int | float) -> tuple[int, int]:
        """The least and the most of `tokens`, without waiting for the device."""
        return self._of(amount)[1]

    def _of(self, amount: int | float) -> tuple[Tensor, tuple[int, int]]:
        if repr(amount) not in self._known:
            budget = Budget(amount, least=0)
            least, most = (budget.of_length(end) for end in self._ends)
            tokens = newly_counted(budget.of(self.tensor))
            self._known[repr(amount)] = (tokens, (least, most))
        return self._known[repr(amount)]


class _Below(Lengths):
    """Copies of lengths below each other; amounts are looked up in the first ones."""

    def __init__(self, lengths: Lengths, times: int) -> None:
        super().__init__(lengths.tensor.repeat(times), lengths._ends)
        self._lengths, self._times = lengths, times

    def _of(self, amount: int | float) -> tuple[Tensor, tuple[int, int]]:
        if repr(amount) not in self._known:
            tokens, ends = self._lengths._of(amount)
            below = newly_counted(tokens.repeat(self._times))
            self._known[repr(amount)] = (below, ends)
        return self._known[repr(amount)]


@dataclass(frozen=True)
class Budget:
    """A number of tokens: an int counts them, a float in (0, 1] is a share of the prompt.

    Raises:
        KVPruneError: not a number, NaN, negative, a float above 1.0, or less than `least`
            tokens (`least=0` allows a part of 0).
    """

    amount: int | float
    name: str = "budget"
    least: int = 1

    def __post_init__(self) -> None:
        amount: Any = self.amount
        number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        whole = isinstance(amount, int)
        if not number or not (amount >= self.least if whole else self._is_share(amount)):
            zero = ", or 0 to leave this part out" if self.least == 0 else ""
            raise KVPruneError(
                f"{self.name}={amount!r}: expected a number of tokens (an int of at least "
                f"{max(self.least, 1)}) or a share of the prompt (a float above 0.0 and up to "
                f"1.0){zero}"
            )

    def _is_share(self, amount: float) -> bool:
        return 0.0 < amount <= 1.0 or (amount == 0.0 and self.least == 0)

    def of(self, length: Tensor) -> Tensor:
        """The budget in tokens for each row.

        Args:
            length: `[B]` int64, what a share is a share of (a row's prompt length).

        Returns:
            `[B]` int64; a share is rounded to the nearest token, halves up, exact for
            decimal shares (0.2 of 100 is 20), at least 1 unless the part is 0.
        """
        if isinstance(self.amount, int) or self.amount == 0:
            return torch.full_like(length, int(self.amount))
        return _share(self.amount, length).clamp(min=1)

    def of_length(self, length: int) -> int:
        """The budget in tokens for one row of so many."""
        if isinstance(self.amount, int) or self.amount == 0:
            return int(self.amount)
        return max(_share(self.amount, length), 1)


def _share(share: float, length: Any) -> Any:
    part = _fraction(share)
    up, down = part.numerator, part.denominator
    return (2 * up * length + down) // (2 * down)


def split_share(share: float, *amounts: int | float) -> tuple[float, ...]:
    """A share of the prompt, split in the proportion of some amounts; exact for decimal shares.

    Amounts of which some are tokens and some are shares have no proportion: parts that are not 0
    are alike then.

    Raises:
        KVPruneError: `share` is not a float in (0, 1].
    """
    if not isinstance(share, float) or not 0.0 < share <= 1.0:
        raise KVPruneError(
            f"with_budget({share!r}): expected a share of the prompt (a float in (0, 1])"
        )
    parts = [_fraction(amount) for amount in amounts]
    if len({type(amount) for amount in amounts if amount}) > 1:
        parts = [Fraction(part != 0) for part in parts]
    return tuple(float(_fraction(share) * part / sum(parts)) for part in parts)


@lru_cache(maxsize=256)
def _fraction(share: float) -> Fraction:
    # The decimal that was typed, not the binary float: 0.1 means 1/10. The bound keeps
    # 2 * numerator * length within int64 for sequences of up to four billion tokens.
    return Fraction(repr(float(share))).limit_denominator(10**9)


def newest(columns: Tensor, count: Tensor, ends: tuple[int, int] | None = None) -> Tensor:
    """The `count` newest entries.

    Args:
        columns: `[B, H, S]` int64, unique, -1 where not valid.
        count: `[B]` or `[B, 1|H]` int64.
        ends: the least and the most of `count`, where they are known; else they are read, which
            waits for the device.

    Returns:
        `[B, H, S]` bool; all valid entries where there are no more than `count`.
    """
    least, most = torch.stack(count.aminmax()).tolist() if ends is None else ends
    size = columns.shape[-1]
    # Not a sort: in decoding, where S is a budget, topk takes a fraction of its time.
    if least == most and 0 < most <= size:
        # A guess: mostly they came one after the other. Where to look at it waits for nothing.
        since = columns.amax(-1, keepdim=True) - (most - 1)
        if in_memory(since):
            found = columns >= since.clamp(min=0)
            if bool((found.sum(-1) == most).all()):
                return found
        oldest = columns.topk(most, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        return columns >= oldest.clamp(min=0)
    oldest = columns.topk(min(max(most, 1), size), dim=-1).values
    count = count.reshape(count.shape[0], -1, 1).expand(-1, columns.shape[1], -1)
    oldest = oldest.gather(-1, (count - 1).clamp(min=0, max=oldest.shape[-1] - 1))
    return (columns >= oldest.clamp(min=0)) & (count > 0)
