"""Facts about each row of a cache: its beginning, its prompt's length, its ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..policy.budget import Lengths


@dataclass(frozen=True, eq=False)
class RowNumbers:
    """Facts about each row of a cache; the same object while nothing of it changes.

    first: `[B]` int64, the first valid column (columns seen so far, where a row has none yet).
    prompt: the valid tokens handed in as prompt, all turns together.
    inner_padding: `[B, n]` bool, which columns are padding, where some row has padding behind its
        first token, as between two turns; None where none has.
    """

    first: Tensor
    prompt: Lengths
    inner_padding: Tensor | None = None
    _leads: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _elsewhere: dict[torch.device, RowNumbers] = field(default_factory=dict, repr=False)

    def lead(self, count: int) -> Tensor:
        """The columns of each row's first `count` tokens, seen or to come, `[B, count]`."""
        places = torch.arange(count, device=self.first.device)
        if self.inner_padding is None:
            return self.first[:, None] + places
        if count not in self._leads:
            so_far = (~self.inner_padding).cumsum(-1)
            inside = (so_far[:, None] <= places[:, None]).sum(-1)
            behind = self.inner_padding.shape[1] + places - so_far[:, -1:]
            self._leads[count] = torch.where(places < so_far[:, -1:], inside, behind)
        return self._leads[count]

    def begin(self, count: int) -> Tensor:
        """The column `[B]` right behind each row's first `count` tokens."""
        if self.inner_padding is None or count == 0:
            return self.first + count
        return self.lead(count)[:, -1] + 1

    def numbers_of(self, columns: Tensor) -> Tensor:
        """The numbers of tokens in their rows, from 0, padding not counted.

        Args:
            columns: `[B, H, S]` int64, -1 for none.

        Returns:
            the same shape, -1 for none.
        """
        number = columns - self.first[:, None, None]
        if self.inner_padding is not None:
            before = self.inner_padding.cumsum(-1)
            last = before.shape[1] - 1
            at = columns.clamp(min=0, max=last).flatten(1)
            number = columns - before.gather(1, at).view_as(columns)
        return number.masked_fill(columns < 0, -1)

    def on(self, device: torch.device) -> RowNumbers:
        """The same on a device; for a model on several, once for each."""
        if self.first.device == device:
            return self
        if device not in self._elsewhere:
            inner = None if self.inner_padding is None else self.inner_padding.to(device)
            there = RowNumbers(self.first.to(device), self.prompt.on(device), inner)
            self._elsewhere[device] = there
        return self._elsewhere[device]

    def tensors(self) -> Iterator[Tensor]:
        """All that is held, for counting bytes."""
        yield from (self.first, self.prompt.tensor, *self._leads.values())
        if self.inner_padding is not None:
            yield self.inner_padding
        for there in self._elsewhere.values():
            yield from there.tensors()

    def below(self, times: int) -> RowNumbers:
        """The same rows so many times, below each other."""
        inner = None if self.inner_padding is None else self.inner_padding.repeat(times, 1)
        return RowNumbers(self.first.repeat(times), self.prompt.below(times), inner)

    def until(self, seen: int, padding: Tensor | None) -> RowNumbers:
        """The same once only `seen` columns are left, of which `padding` `[B, n]` are padding."""
        hidden = 0 if padding is None else padding[:, :seen].sum(-1)
        prompt = self.prompt.tensor.minimum(torch.as_tensor(seen - hidden).to(self.first.device))
        first = self.first.clamp(max=seen)
        return RowNumbers(first, Lengths(prompt), inner_padding_of(padding, first))

    def select(self, rows: Tensor) -> RowNumbers:
        """Row i becomes what row `rows[i]` was."""
        rows = rows.to(self.first.device)
        prompt = Lengths(self.prompt.tensor.index_select(0, rows))
        inner = None if self.inner_padding is None else self.inner_padding.index_select(0, rows)
        return RowNumbers(self.first.index_select(0, rows), prompt, inner)


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
        padding: see `padding_so_far`.
        same_padding: whether `padding` is as it was before.
    """
    same_prompt = isinstance(prompt, int) and prompt == 0
    if before is not None and same_padding and same_prompt:
        return before
    first, inner = torch.zeros_like(columns[:, 0]), None
    if before is not None and same_padding:
        first, inner = before.first, before.inner_padding
    elif padding is not None:
        # The number of a row's leading padding columns.
        first = padding.long().cumprod(-1).sum(-1)
        inner = inner_padding_of(padding, first)
    if before is not None and same_prompt:
        return RowNumbers(first, before.prompt, inner)
    so_far = torch.zeros_like(first) if before is None else before.prompt.tensor
    prompts = Lengths(so_far + torch.as_tensor(prompt, device=columns.device))
    return RowNumbers(first, prompts, inner)


def inner_padding_of(padding: Tensor | None, first: Tensor) -> Tensor | None:
    """`RowNumbers.inner_padding`.

    Args:
        padding: `[B, n]` bool, which columns are padding; None while none is.
        first: `[B]`, each row's first token.
    """
    if padding is None or not bool((padding.sum(-1) > first).any()):
        return None
    return padding


@dataclass(frozen=True, eq=False)
class PromptIds:
    """The ids that a cache has read as prompt, all turns together, to know them again.

    They are in main memory, and compared once for each prompt. What was generated, what came as
    embeddings and padding is not among them.

    ids: `[R, n]` int32 on the CPU, by column; -1 where nothing is known.
    rows: `[B]`, which of these rows each of the cache's is, wherever beams were chosen, so that
        choosing copies nothing and waits for nothing; None where they are the same.
    """

    ids: Tensor
    rows: Tensor | None = None

    @classmethod
    def none(cls, rows: int) -> PromptIds:
        """Nothing read yet."""
        return cls(torch.full((rows, 0), -1, dtype=torch.int32))

    def by_row(self) -> Tensor:
        """`[B, n]`."""
        return self.ids if self.rows is None else self.ids.index_select(0, self.rows.cpu())

    def followed(self, start: int, ids: Tensor, columns: Tensor | None) -> PromptIds:
        """With more ids behind them.

        Args:
            start: the column of the first.
            ids: `[B, Q]`.
            columns: the same shape, -1 for padding; None if none is.
        """
        new = ids.detach().int()
        if columns is not None:
            new = new.masked_fill(columns.to(new.device) < 0, -1)
        before = self.by_row()
        gap = start - before.shape[1]
        before = torch.nn.functional.pad(before, (0, gap), value=-1)
        return PromptIds(torch.cat([before, new.cpu()], 1))

    def select(self, rows: Tensor) -> PromptIds:
        """Row i becomes what row `rows[i]` was."""
        known = self.rows
        return PromptIds(self.ids, rows if known is None else known.to(rows.device)[rows])

    def until(self, seen: int) -> PromptIds:
        """Without what is behind `seen` columns."""
        return PromptIds(self.ids[:, :seen], self.rows)

    def difference(self, ids: Tensor, hidden: Sequence[Tensor]) -> tuple[list[int], int] | None:
        """The first difference of other ids from these.

        Args:
            ids: `[R, m]`, R either B or a part of it, where each row stands for several, as with
                `num_return_sequences`.
            hidden: each `[R|B, k]` bool, columns that do not matter.

        Returns:
            the rows that differ, and the first column; None if none does, or if the rows cannot
            be matched.
        """
        known = self.by_row()
        size = min(known.shape[1], ids.shape[1])
        known, count = known[:, :size], known.shape[0]
        if count % max(ids.shape[0], 1):
            return None
        given = ids[:, :size].detach().int().cpu()
        wrong = (known != given.repeat_interleave(count // ids.shape[0], 0)) & (known >= 0)
        for each in hidden:
            here = each[:, :size].cpu().repeat_interleave(count // each.shape[0], 0)
            wrong[:, : here.shape[1]] &= ~here
        if not bool(wrong.any()):
            return None
        rows = wrong.any(-1).nonzero().flatten().tolist()
        return rows, int(wrong.any(0).nonzero()[0])
