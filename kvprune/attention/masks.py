"""The lazy mask: the model's own rule, evaluated at (query columns, slot columns).

Stock code makes one mask for all layers before the first of them runs, which is wrong once
layers hold different slots. The mask functions registered here hand the *rule* on instead,
and attention evaluates it for the slots that a layer really holds.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import KVPruneError
from ..models.structure import Local


class _Ours(int):
    pass


OURS = _Ours(0)
"""The offset of a cache of ours, by which it is told apart.

transformers hands a mask function the length and the offset that the cache reported, but not
the cache. This very object says that the cache is one of ours.
"""


class Mask(Protocol):
    """The rule of what attention may attend to, evaluated at the columns that are present alone."""

    plainly_causal: bool
    """Every slot is visible whose column is not newer than the query's."""
    stock: bool
    """Nothing hides slots but causality, padding and what the layer can see."""

    same_for_heads: bool
    """All heads have one rule."""

    def at(self, queries: Tensor, slots: Tensor, row: int | Tensor | None = None) -> Tensor:
        """The mask at some columns.

        Args:
            queries: `[B, Q]` int64, columns of the queries.
            slots: `[B, H, S]` int64, columns of the slots, -1 where empty.
            row: the one row of the batch that is meant, B is then 1; or several, `[B]` int64.
                None for all of them.

        Returns:
            `[B, 1|H|Hq, Q, S]`: bool (True: may attend) or float (added to the scores).
        """
        ...


class LazyMask:
    """A mask function's arguments, kept until the columns are known."""

    same_for_heads = True

    def __init__(
        self,
        rule: Callable[..., Tensor],
        plainly_causal: bool,
        stock: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._rule, self._device = rule, device
        self.plainly_causal = plainly_causal
        self.stock = stock
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        # accelerate asks everything that it hands to a layer whether it can be moved.
        if name.startswith("__") or name == "to":
            raise AttributeError(name)
        raise KVPruneError(
            f"this model's code reads its attention mask by itself (.{name}), which kvprune "
            f"cannot follow: the model is not supported"
        )

    def at(self, queries: Tensor, slots: Tensor, row: int | Tensor | None = None) -> Tensor:
        """See `Mask.at`; layers that hold the very same columns share one evaluation."""
        if self._last is not None and self._last[0] is queries and self._last[1] is slots:
            return self._last[2]
        there = queries.device
        if self._device is None or self._device == there or not _holds_tensors(self._rule):
            mask = self._evaluated(queries, slots, row)
        else:
            # What the rule holds is where the mask was made.
            mask = self._evaluated(queries.to(self._device), slots.to(self._device), row).to(there)
        if row is None:
            self._last = (queries, slots, mask)
        return mask

    def _evaluated(self, queries: Tensor, slots: Tensor, row: int | Tensor | None) -> Tensor:
        if isinstance(row, Tensor):
            rows = row.to(queries.device)
        else:
            start = 0 if row is None else row
            rows = torch.arange(start, start + queries.shape[0], device=queries.device)
        rows, keys = rows[:, None, None, None], slots[:, :, None, :]
        return self._rule(rows, rows.new_zeros(()), queries[:, None, :, None], keys) & (keys >= 0)


def _holds_tensors(part: Any) -> bool:
    """Whether a rule is more than arithmetic on columns, as far as one can see."""
    if isinstance(part, (tuple, list)):
        return any(map(_holds_tensors, part))
    if isinstance(part, FunctionType):
        held = [cell.cell_contents for cell in part.__closure__ or ()]
        return _holds_tensors(held + list(part.__defaults__ or ()))
    return not isinstance(part, (int, float, str, type(None)))


class GivenMask:
    """A 4-D mask that the user handed in: its rows and columns are gathered."""

    plainly_causal = False
    stock = False

    def __init__(self, mask: Tensor, seen: int) -> None:
        self._mask = mask
        self._seen = seen
        self.same_for_heads = mask.shape[1] == 1

    def at(self, queries: Tensor, slots: Tensor, row: int | Tensor | None = None) -> Tensor:
        """See `Mask.at`."""
        mask = self._mask
        if row is not None and mask.shape[0] > 1:
            mask = mask[row] if isinstance(row, Tensor) else mask[row : row + 1]
        batch, slot_heads, _ = slots.shape
        heads, width = max(mask.shape[1], slot_heads), mask.shape[-1]
        mask = mask.expand(batch, heads, -1, -1)
        at_queries = (queries - self._seen).clamp(min=0)[:, None, :, None]
        mask = mask.gather(2, at_queries.expand(-1, mask.shape[1], -1, width))
        groups = mask.shape[1] // slot_heads
        at_slots = slots.clamp(min=0).repeat_interleave(groups, 1)[:, :, None, :]
        mask = mask.gather(3, at_slots.expand(-1, -1, mask.shape[2], -1))
        empty = (slots < 0).repeat_interleave(groups, 1)[:, :, None, :]
        return mask.masked_fill(empty, _hidden(mask.dtype))


def mask_or_rule(stock: Callable[..., Any], **arguments: Any) -> Any:
    """The registered mask function: a `LazyMask` for our caches, the stock mask otherwise."""
    if arguments["kv_offset"] is not OURS:
        return stock(**arguments)
    length: int = arguments["kv_length"]
    local: int | None = arguments.get("local_size")
    plain: bool = arguments.get("allow_is_causal_skip", True)
    causal = plain and (local is None or length < local)
    return LazyMask(arguments["mask_function"], causal, plain, arguments.get("device"))


def is_known(mask: Mask, local: Local | None) -> bool:
    """Whether a mask is causality, padding and at most the sliding window `local`."""
    slides = local is not None and not local.chunked
    return mask.plainly_causal or (mask.stock and slides)


def window_of(mask: Mask, local: Local | None) -> int | None:
    """The window that a known mask hides slots by, in columns; None if it has none."""
    return None if mask.plainly_causal or local is None else local.size


def as_mask(mask: LazyMask | Tensor, seen: int) -> Mask:
    """The mask that an attention module was handed, as a `Mask`."""
    return GivenMask(mask, seen) if isinstance(mask, Tensor) else mask


def biased_mask(hidden: Tensor, mask: Tensor | None, bias: Tensor) -> Tensor:
    """A stock mask as floats, with something added to the scores of the first tokens.

    Args:
        hidden: `[B, Q, C]`, what the mask is for.
        mask: `[B, 1|Hq, Q, N]`; None for a causal one, without a cache.
        bias: `[n]`, n at most N.
    """
    if mask is None:
        size = hidden.shape[1]
        mask = torch.ones(1, 1, size, size, dtype=torch.bool, device=hidden.device).tril()
    assert mask.shape[-1] >= len(bias), "no mask is handed where there is a cache"
    padded = torch.nn.functional.pad(bias, (0, mask.shape[-1] - len(bias)))
    return additive(mask, hidden.dtype) + padded.to(hidden.dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as floats to add to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, _hidden(dtype))


def _hidden(dtype: torch.dtype) -> float | bool:
    # Finite, so that a query that may attend to nothing (padding) gets no NaN; also in
    # float32, which eager functions take the softmax in.
    if dtype == torch.bool:
        return False
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
