"""Buffers of slots: written in place where nobody watches, and made anew where somebody does."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.devices import without_autocast
from ..statistics import statistic_dtype

SLACK = 8
"""Slots that there may be room for beyond those in use, at least; see `spare`."""


def spare(size: int) -> int:
    """The slots that there may be room for beyond `size`, before the buffers are made anew."""
    return max(SLACK, size // 32)


def put(buffer: Tensor | None, slot: Tensor, new: Tensor | float) -> Tensor:
    """Writes one slot per row and head; in place unless somebody watches.

    Args:
        buffer: `[B, H, S, ...]`.
        slot: `[B, H, 1]` int64, or `[B, 1, 1]` where `new` has a head axis of H; or what
            `index_of` made of it.
        new: `[B, H, 1, ...]`, or one number for all.

    Returns:
        the buffer, or a new one, of the wider dtype of the two.
    """
    assert buffer is not None
    if torch.is_grad_enabled():
        # Autograd saves where something was written.
        slot = of_this_mode(slot)
    if not isinstance(new, Tensor):
        return buffer.scatter(2, slot, new) if watched(buffer) else buffer.scatter_(2, slot, new)
    index = slot if slot.shape == new.shape else index_of(slot, new)
    if buffer.dtype != new.dtype:
        buffer, new = of_one_dtype(buffer, new)
    if watched(buffer, new):
        return buffer.scatter(2, index, new)
    return buffer.scatter_(2, index, new)


def index_of(slot: Tensor, new: Tensor) -> Tensor:
    """The index of `new` `[B, H, 1]` or `[B, H, 1, n]`, which goes to `slot` `[B, 1|H, 1]`."""
    return (slot if new.dim() == slot.dim() else slot.unsqueeze(-1)).expand_as(new)


def first_slots(buffer: Tensor, used: int) -> Tensor:
    """The first `used` slots of `[B, H, S, ...]`; the very buffer where it has no more."""
    return buffer if buffer.shape[2] == used else buffer[:, :, :used]


def extended(buffer: Tensor | None, new: Tensor, used: int) -> Tensor:
    """`new` behind the first `used` slots of `buffer`, which grows geometrically.

    Written in place where there is room and nobody watches.
    """
    if buffer is None:
        # A copy: what a model hands in may be a slice of a fused projection, which would keep
        # three times the bytes, or what somebody else holds too.
        return new.clone(memory_format=torch.contiguous_format)
    size = used + new.shape[2]
    if buffer.dtype != new.dtype:
        buffer, new = of_one_dtype(buffer, new)
    if watched(buffer, new):
        with without_autocast(new.device):
            return torch.cat([buffer[:, :, :used], new], 2)
    if size > buffer.shape[2]:
        room = spare(size) if new.shape[2] == 1 else 0
        larger = buffer.new_empty((*buffer.shape[:2], size + room, *buffer.shape[3:]))
        larger[:, :, :used] = buffer[:, :, :used]
        buffer = larger
    buffer[:, :, used:size] = new
    return buffer


def begun(buffer: Tensor | None, new: Tensor, size: int, start: float) -> Tensor:
    """A statistic that has room for `size` slots, which hold `start` where no token was.

    Args:
        buffer: `[B, H, S]`; None before the first tokens.
        new: `[B, H, Q, ...]`, the keys of the tokens that take the last of the slots.
        size: slots in use, once these are stored.
        start: what a slot begins with.

    Returns:
        the very buffer where it has the room: nothing is to be written.
    """
    dtype = statistic_dtype(new.dtype)
    if buffer is None:
        return new.new_full(new.shape[:3], start, dtype=dtype)
    if buffer.dtype != dtype:
        buffer = buffer.to(torch.promote_types(buffer.dtype, dtype))
    lacking = size - buffer.shape[2]
    if lacking <= 0:
        return buffer
    return roomier(buffer, lacking + (spare(size) if new.shape[2] == 1 else 0), start)


def of_one_dtype(buffer: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype, as `torch.cat` has it: autocast may be on in one forward alone."""
    wider = torch.promote_types(buffer.dtype, new.dtype)
    return buffer.to(wider), new.to(wider)


def of_this_mode(tensor: Tensor) -> Tensor:
    """A tensor that autograd may save: one made in inference mode is copied."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def watched(*tensors: Tensor) -> bool:
    """Whether writing in place is forbidden: autograd may have saved what would be overwritten.

    Not only where keys want a gradient themselves: attention saves them for the queries'.
    """
    if torch.is_grad_enabled():
        return True
    # Compilers cannot see inference mode; they would fail where a tensor may not be written to.
    unseen = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
    for tensor in tensors:
        if tensor.requires_grad or not (unseen or not tensor.is_inference()):
            return True
    return False


def numbers_at(slots: Tensor, numbers: Tensor, columns: Tensor) -> Tensor:
    """Numbers of tokens, for the slots that hold these.

    Args:
        slots: `[B, 1|H, S]` int64, their columns, -1 for none.
        numbers: `[B, 1|H, n]` floats.
        columns: `[B, n]` int64, of the tokens, -1 for none.

    Returns:
        `[B, 1|H, S]`, NaN for slots of other tokens.
    """
    ordered, order = columns.sort(-1)
    flat = slots.flatten(1).contiguous()
    place = torch.searchsorted(ordered, flat).clamp(max=columns.shape[1] - 1)
    there = ((ordered.gather(1, place) == flat) & (flat >= 0)).view_as(slots)
    index = order.gather(1, place).view_as(slots)
    heads = max(slots.shape[1], numbers.shape[1])
    found = numbers.expand(-1, heads, -1).gather(-1, index.expand(-1, heads, -1))
    return found.masked_fill(~there, torch.nan)


def widened(columns: Tensor, size: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(columns, (0, size - columns.shape[-1]), value=fill)


def roomier(buffer: Tensor, room: int, fill: float) -> Tensor:
    """`[B, H, S, ...]` with room for more slots; the very object where there is none to add."""
    if not room:
        return buffer
    more = buffer.new_full((*buffer.shape[:2], room, *buffer.shape[3:]), fill)
    with without_autocast(buffer.device):
        return torch.cat([buffer, more], 2)


def gathered(buffer: Tensor, order: Tensor, room: int) -> Tensor:
    """The slots `order` `[B, 1|H, n]` of `buffer` `[B, H, S, ...]`, and room for more."""
    rows, heads, size = buffer.shape[:3]
    # What is in the room matters to nobody but statistics, for which the caller fills it.
    order = torch.nn.functional.pad(order, (0, room))
    # Slot by slot, which is ten times as quick as `gather`, number by number.
    first = size * torch.arange(rows * heads, device=order.device).view(rows, heads, 1)
    found = buffer.flatten(0, 2).index_select(0, (order + first).flatten())
    return found.view(rows, heads, -1, *buffer.shape[3:])
