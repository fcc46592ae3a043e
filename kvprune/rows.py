"""What a cache knows of each of its rows: where it begins, and how long its prompt is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .policy import Lengths


@dataclass(frozen=True, eq=False)
class RowNumbers:
    """What a cache knows of each of its rows; the same object while nothing of it changes.

    first: `[B]` int64, the first valid column (columns seen so far, where a row has none yet).
    prompt: the valid tokens handed in as prompt, all turns together.
    holes: `[B, n]` bool, which columns are padding, where some row has padding behind its first
        token, as between two turns; None where none has.
    """

    first: Tensor
    prompt: Lengths
    holes: Tensor | None = None
    _leads: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _elsewhere: dict[torch.device, RowNumbers] = field(default_factory=dict, repr=False)

    def lead(self, count: int) -> Tensor:
        """The columns of each row's first `count` tokens, seen or to come, `[B, count]`."""
        places = torch.arange(count, device=self.first.device)
        if self.holes is None:
            return self.first[:, None] + places
        if count not in self._leads:
            so_far = (~self.holes).cumsum(-1)
            inside = (so_far[:, None] <= places[:, None]).sum(-1)
            behind = self.holes.shape[1] + places - so_far[:, -1:]
            self._leads[count] = torch.where(places < so_far[:, -1:], inside, behind)
        return self._leads[count]

    def begin(self, count: int) -> Tensor:
        """The column `[B]` right behind each row's first `count` tokens."""
        if self.holes is None or count == 0:
            return self.first + count
        return self.lead(count)[:, -1] + 1

    def on(self, device: torch.device) -> RowNumbers:
        """The same on a device; for a model on several, once for each."""
        if self.first.device == device:
            return self
        if device not in self._elsewhere:
            holes = None if self.holes is None else self.holes.to(device)
            there = RowNumbers(self.first.to(device), self.prompt.on(device), holes)
            self._elsewhere[device] = there
        return self._elsewhere[device]

    def tensors(self) -> Iterator[Tensor]:
        """All that is held, for counting bytes."""
        yield from (self.first, self.prompt.tensor, *self._leads.values())
        if self.holes is not None:
            yield self.holes
        for there in self._elsewhere.values():
            yield from there.tensors()

    def below(self, times: int) -> RowNumbers:
        """The same rows so many times, below each other."""
        holes = None if self.holes is None else self.holes.repeat(times, 1)
        return RowNumbers(self.first.repeat(times), self.prompt.below(times), holes)

    def until(self, seen: int, padding: Tensor | None) -> RowNumbers:
        """The same once only `seen` columns are left, of which `padding` `[B, n]` are padding."""
        hidden = 0 if padding is None else padding[:, :seen].sum(-1)
        prompt = self.prompt.tensor.minimum(torch.as_tensor(seen - hidden).to(self.first.device))
        first = self.first.clamp(max=seen)
        return RowNumbers(first, Lengths(prompt), holes_in(padding, first))

    def select(self, rows: Tensor) -> RowNumbers:
        """Row i becomes what row `rows[i]` was."""
        rows = rows.to(self.first.device)
        prompt = Lengths(self.prompt.tensor.index_select(0, rows))
        holes = None if self.holes is None else self.holes.index_select(0, rows)
        return RowNumbers(self.first.index_select(0, rows), prompt, holes)


def rows_after(
    before: RowNumbers | None,
    columns: Tensor,
    prompt: Tensor | int,
    padding: Tensor | None,
    same_padding: bool,
) -> RowNumbers:
    """The rows' numbers once a forward's tokens are in.

    Args:
        before: as they were; None for an empty cache.
        columns: `[B, Q]`, -1 for padding.
        prompt: the prompt tokens that this adds, `[B]` or the same for all.
        padding: see `padding_so_far`. same_padding: whether it is as it was before.
    """
    same_prompt = isinstance(prompt, int) and prompt == 0
    if before is not None and same_padding and same_prompt:
        return before
    first, holes = torch.zeros_like(columns[:, 0]), None
    if before is not None and same_padding:
        first, holes = before.first, before.holes
    elif padding is not None:
        # The number of a row's leading padding columns.
        first = padding.long().cumprod(-1).sum(-1)
        holes = holes_in(padding, first)
    if before is not None and same_prompt:
        return RowNumbers(first, before.prompt, holes)
    so_far = torch.zeros_like(first) if before is None else before.prompt.tensor
    prompts = Lengths(so_far + torch.as_tensor(prompt, device=columns.device))
    return RowNumbers(first, prompts, holes)


def holes_in(padding: Tensor | None, first: Tensor) -> Tensor | None:
    """`RowNumbers.holes`, of what is padding `[B, n]` and each row's first token `[B]`."""
    if padding is None or not bool((padding.sum(-1) > first).any()):
        return None
    return padding
