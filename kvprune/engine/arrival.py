"""The tokens that a forward brings to a cache: their columns, their padding, their rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import KVPruneError
from ..storage.rows import RowNumbers


def new_columns(
    rows: int,
    count: int,
    seen: int,
    mask: Tensor | None,
    heads: int,
    may_end_in_padding: bool,
    device: torch.device,
) -> Tensor:
    """The columns of a forward's tokens, `[B, Q]` int64, -1 for padding.

    Args:
        rows, count: B and Q.
        seen: columns before them.
        mask: see `ComposedCache.open_step`; a 4-D one says nothing of padding.
        heads: Hq.
        may_end_in_padding: whether a row's tokens may have padding behind them, as in a chunk of
            a prompt, or where a row pauses.
        device: where the tokens are.

    Raises:
        KVPruneError: the mask does not fit, or pads on the right.
    """
    columns = torch.arange(seen, seen + count, device=device).expand(rows, -1)
    mask = None if mask is None else mask.to(device)
    if mask is None or _is_four_d(mask, rows, count, seen, heads):
        return columns.contiguous()
    if not may_end_in_padding:
        _check_left_padded(mask)
    return columns.masked_fill(mask[:, seen:] == 0, -1)


def _is_four_d(mask: Tensor, rows: int, count: int, seen: int, heads: int) -> bool:
    """Whether a mask is 4-D; refuses one of any other shape than is expected."""
    total = seen + count
    four_d = mask.dim() == 4 and mask.shape[0] in (1, rows) and mask.shape[1] in (1, heads)
    if four_d and mask.shape[2:] == (count, total):
        return True
    if mask.shape != (rows, total):
        raise KVPruneError(
            f"attention_mask: expected shape [{rows}, {total}] (all columns seen so far and "
            f"the new ones) or 4-D [1 or {rows}, 1 or {heads}, {count}, {total}], got "
            f"{list(mask.shape)}"
        )
    return False


def _check_left_padded(mask: Tensor) -> None:
    """Refuses padding behind a row's tokens `[B, columns]`."""
    right = (mask[:, -1] == 0) & mask.bool().any(-1)
    if bool(right.any()):
        raise KVPruneError(
            f"the batch is padded on the right in rows {right.nonzero().flatten().tolist()}: "
            f"expected left padding. Set tokenizer.padding_side = 'left'"
        )


def padding_so_far(before: Tensor | None, columns: Tensor, mask: Tensor | None) -> Tensor | None:
    """The columns that are padding, `[B, n]` bool; those behind are not. None if none is.

    What was padding once stays padding; a later mask may hide columns that were not. It is
    `before` itself where nothing is new.
    """
    if mask is None or mask.dim() == 4:
        return before
    padding = mask.to(columns.device) == 0
    known = torch.zeros_like(padding)
    if before is not None:
        known[:, : before.shape[1]] = before
    return padding | known if bool((padding & ~known).any()) else before


@dataclass(frozen=True, eq=False)
class Arrival:
    """The tokens that a forward brings to a cache.

    columns: `[B, Q]` int64, -1 for padding.
    complete: it is known that none is -1.
    padding: see `padding_so_far`.
    rows: facts about the rows, this forward included.
    same_rows: whether these are as before this forward.
    """

    columns: Tensor
    complete: bool
    padding: Tensor | None
    rows: RowNumbers
    same_rows: bool


def asked_tokens(
    logits_to_keep: int | Tensor,
    rows: int,
    count: int,
    device: torch.device,
    columns: Tensor | None = None,
) -> Tensor:
    """`[B, Q]` bool, the tokens that logits are asked for; 0 means the last one alone.

    Args:
        logits_to_keep: as the model's forward takes it; a number is of each row's newest tokens,
            whatever padding is behind them.
        rows, count, device: of the tokens.
        columns: `[B, Q]`, theirs, -1 for padding; None if none is.

    Raises:
        KVPruneError: neither a number nor places of tokens that there are.
    """
    _check_asked(logits_to_keep, count)
    asked = torch.zeros(rows, count, dtype=torch.bool, device=device)
    if isinstance(logits_to_keep, int) and columns is not None:
        valid = columns >= 0
        behind = valid.flip(-1).cumsum(-1).flip(-1)
        asked = valid & (behind <= max(logits_to_keep, 1))
    elif isinstance(logits_to_keep, int):
        asked[:, -max(logits_to_keep, 1) :] = True
    elif logits_to_keep.dtype == torch.bool:
        asked |= logits_to_keep.to(device)
    else:
        places = logits_to_keep.to(device) % count
        asked.scatter_(1, places.expand(rows, -1) if places.dim() == 1 else places, True)
    return asked


def _check_asked(logits_to_keep: Any, count: int) -> None:
    number = isinstance(logits_to_keep, int)
    if not number and not (isinstance(logits_to_keep, Tensor) and logits_to_keep.dim() > 0):
        raise KVPruneError(
            f"logits_to_keep={logits_to_keep!r}: expected a number of tokens, or a tensor of their "
            f"places"
        )
    if number or logits_to_keep.dtype == torch.bool or not logits_to_keep.numel():
        return
    lowest, highest = (int(end) for end in logits_to_keep.aminmax())
    if lowest < -count or highest >= count:
        raise KVPruneError(
            f"logits_to_keep: expected places of {count} tokens, so from {-count} to {count - 1}, "
            f"got {lowest} to {highest}"
        )
