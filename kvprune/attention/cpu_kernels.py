"""Kernels over codes for a CPU, compiled by numba, where it is installed.

They compute what `Coded` and `storage.codes` compute by torch's operators. Between so many
operators a decode step spends more time than within them. A kernel runs on one thread.

Indices of what innermost loops read and write are unsigned: numba tests each signed index for being
negative, and such loops do not run in the parallel lanes of a register.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

_LEAST = -24
"""The exponent of the smallest number of half precision."""

_MOST = 65504.0
"""The largest number of half precision."""

_REBASED = np.float32(2.0**112)
"""Times it, the bits of half precision in the places of a float32's stand for their number."""

_NUMBER, _SIGN = np.uint32(0x7FFF), np.uint32(0x8000)
"""Of half precision: all bits but the sign, and the sign."""

_PLACES, _HIGHER = np.uint32(13), np.uint32(16)
"""How many places higher these stand in a float32."""

_FULL = np.uint32(0x0F800000)
"""There, the exponent of what is not finite."""

_FOUR, _ONES, _NIBBLES = np.uint64(4), np.uint64(0x0101010101010101), np.uint64(0x0F0F0F0F0F0F0F0F)
"""Of words: the bits of half a byte, the lowest bit of each byte, and the lower half of each."""


_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz"},
}
"""Sums may be reordered, so that they run in parallel lanes of a register; NaN stays NaN."""


def _compiled(kernel: Kernel) -> Kernel:
    """Compiles a kernel at its first call; the machine code is kept on disk where that can be."""
    try:
        found: Kernel = numba.njit(cache=True, **_OPTIONS)(kernel)
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written to.
        found = numba.njit(**_OPTIONS)(kernel)
    return found


def _part(kernel: Kernel) -> Kernel:
    """A part of kernels, compiled into each: a call for every vector would cost a third more."""
    found: Kernel = numba.njit(inline="always", **_OPTIONS)(kernel)
    return found


# The arguments of the three kernels that read vectors back; `Coded` says where each code is:
#   words: `[B, H, S, n / 8]` uint64, eight bytes of codes each.
#   grid: `[B, H, S, 2 * groups]` uint16, numbers of half precision: scales and then zero points.
#   bits: of a code.
#   groups: of a vector.
#   turn: whether queries are turned first, or sums at last; see `hadamard`.


@_part
def _read_grids(grid: Any, row: Any, head: Any, each: int, grids: Any) -> None:
    """The numbers that a head's numbers of half precision stand for, those of all slots at once.

    Args:
        grid: see above.
        row, head: which.
        each: numbers of a slot.
        grids: `[S * each]` float32, written to; those of one slot follow those of another.
    """
    bits = grids.view(np.uint32)
    for slot in range(len(grids) // each):
        for k in range(each):
            half = np.uint32(grid[row, head, np.uint64(slot), np.uint64(k)])
            single = (half & _NUMBER) << _PLACES | (half & _SIGN) << _HIGHER
            bits[np.uint64(slot * each + k)] = single
    for i in range(len(grids)):
        at = np.uint64(i)
        # The exponent counts from 127 and not from 15; a product also gets small numbers right.
        number = grids[at] * _REBASED
        grids[at] = np.float32(np.nan) if bits[at] & _FULL == _FULL else number


@_part
def _scale(numbers: Any, grids: Any, slot: int, groups: int, group: int, vector: Any) -> None:
    """The vector that codes stand for.

    Args:
        numbers: `[D]` uint8, the codes.
        grids: see `_read_grids`.
        slot: the vector's.
        groups: of the vector.
        group: numbers of a group.
        vector: `[D]`, written to.
    """
    first = np.uint64(slot * 2 * groups)
    for k in range(groups):
        scale = vector.dtype.type(grids[first + np.uint64(k)])
        zero = vector.dtype.type(grids[first + np.uint64(groups + k)])
        begin = np.uint64(k * group)
        for i in range(group):
            at = begin + np.uint64(i)
            vector[at] = numbers[at] * scale + zero


@_part
def _unpack(words: Any, row: Any, head: Any, slot: Any, bits: int, count: int, vector: Any) -> None:
    """The codes of a vector, a byte each, eight of them at once.

    Args:
        words: see above.
        row, head, slot: which.
        bits: of a code.
        count: D / 8.
        vector: `[D / 8]` uint64, written to.
    """
    half, eighth = np.uint64(count // 2), np.uint64(count // 8)
    if bits == 8:
        for i in range(count):
            vector[np.uint64(i)] = words[row, head, slot, np.uint64(i)]
    else:
        for i in range(half):
            word = words[row, head, slot, np.uint64(i)]
            vector[np.uint64(i)] = word & _NIBBLES
            vector[half + np.uint64(i)] = (word >> _FOUR) & _NIBBLES
        if bits == 5:
            for j in range(eighth):
                word = words[row, head, slot, half + np.uint64(j)]
                for bit in range(8):
                    fifth = (word >> np.uint64(bit)) & _ONES
                    vector[np.uint64(bit) * eighth + np.uint64(j)] |= fifth << _FOUR


@_compiled
def _turn(vector: Any) -> None:
    """Hadamard's rotation of `[D]`, in place, by sums and differences."""
    size = len(vector)
    block = size & -size
    span = 1
    while span < block:
        for start in range(0, size, 2 * span):
            for i in range(start, start + span):
                a, b = vector[i], vector[i + span]
                vector[i] = a + b
                vector[i + span] = a - b
        span *= 2
    length = vector.dtype.type(math.sqrt(block))
    for i in range(size):
        vector[i] /= length


@_compiled
def read(words: Any, grid: Any, bits: int, groups: int, out: Any) -> None:
    """Reads vectors back into `out`, `[B, H, S, D]`; for the rest see above."""
    rows, heads, slots, size = out.shape
    codes, grids = np.empty(size // 8, np.uint64), np.empty(slots * 2 * groups, np.float32)
    numbers = codes.view(np.uint8)
    for row in range(np.uint64(rows)):
        for head in range(np.uint64(heads)):
            _read_grids(grid, row, head, 2 * groups, grids)
            for slot in range(slots):
                _unpack(words, row, head, np.uint64(slot), bits, size // 8, codes)
                _scale(numbers, grids, slot, groups, size // groups, out[row, head, slot])


@functools.cache
def over_vectors(known_size: int | None, known_groups: int | None) -> tuple[Any, Any]:
    """The kernels `products` and `weighted`, for all vectors or for those of one kind.

    For one kind they take half the time, as their loops are of known lengths.

    Args:
        known_size: D; None for any.
        known_groups: of a vector; likewise.
    """

    @_compiled
    def products(
        words: Any, grid: Any, bits: int, groups: int, turn: bool, queries: Any, out: Any
    ) -> None:
        """Products of queries `[B, H, G, D]` with vectors into `out`, `[B, H, G, S]`."""
        rows, heads, each, slots = out.shape
        size = queries.shape[3] if known_size is None else known_size
        pairs = groups if known_groups is None else known_groups
        codes, grids = np.empty(size // 8, np.uint64), np.empty(slots * 2 * pairs, np.float32)
        numbers = codes.view(np.uint8)
        vector, mine = np.empty(size, out.dtype), np.empty(each * size, out.dtype)
        for row in range(np.uint64(rows)):
            for head in range(np.uint64(heads)):
                _read_grids(grid, row, head, 2 * pairs, grids)
                for g in range(each):
                    for i in range(size):
                        mine[g * size + i] = queries[row, head, g, i]
                    if turn:
                        _turn(mine[g * size : (g + 1) * size])
                for slot in range(slots):
                    _unpack(words, row, head, np.uint64(slot), bits, size // 8, codes)
                    _scale(numbers, grids, slot, pairs, size // pairs, vector)
                    for g in range(each):
                        begin, total = np.uint64(g * size), out.dtype.type(0)
                        for i in range(size):
                            total += mine[begin + np.uint64(i)] * vector[np.uint64(i)]
                        out[row, head, g, slot] = total

    @_compiled
    def weighted(
        words: Any, grid: Any, bits: int, groups: int, turn: bool, weights: Any, out: Any
    ) -> None:
        """Sums of vectors by weights `[B, H, G, S]` into `out`, `[B, H, G, D]`."""
        rows, heads, each, slots = weights.shape
        size = out.shape[3] if known_size is None else known_size
        pairs = groups if known_groups is None else known_groups
        codes, grids = np.empty(size // 8, np.uint64), np.empty(slots * 2 * pairs, np.float32)
        numbers = codes.view(np.uint8)
        vector, sums = np.empty(size, out.dtype), np.empty(each * size, out.dtype)
        for row in range(np.uint64(rows)):
            for head in range(np.uint64(heads)):
                _read_grids(grid, row, head, 2 * pairs, grids)
                sums[:] = 0
                for slot in range(slots):
                    _unpack(words, row, head, np.uint64(slot), bits, size // 8, codes)
                    _scale(numbers, grids, slot, pairs, size // pairs, vector)
                    for g in range(each):
                        begin, weight = np.uint64(g * size), weights[row, head, g, slot]
                        for i in range(size):
                            sums[begin + np.uint64(i)] += weight * vector[np.uint64(i)]
                for g in range(each):
                    if turn:
                        _turn(sums[g * size : (g + 1) * size])
                    for i in range(size):
                        out[row, head, g, i] = sums[g * size + i]

    return products, weighted


@_compiled
def write(
    keys: Any, values: Any, bits: Any, groups: Any, turn: bool, codes: Any, grid: Any
) -> None:
    """Writes keys and values as codes; see `storage.codes.encode` and `packed`.

    Args:
        keys: `[n, D]`, float32 or float64.
        values: `[n, Dv]`, likewise.
        bits: two numbers, of a code of keys and of values.
        groups: two numbers, of a key and of a value.
        turn: whether vectors are turned first; see `hadamard`.
        codes: `[n, bytes]` uint8, written to: a key's and then its value's.
        grid: `[n, 2 * groups]`, likewise: scales and then zero points of each, rounded to half
            precision.
    """
    code = np.empty(max(keys.shape[1], values.shape[1]), np.uint8)
    vector = np.empty(len(code), keys.dtype)
    ends = keys.shape[1] * bits[0] // 8, 2 * groups[0]
    for row in range(len(keys)):
        mine = vector[: keys.shape[1]]
        for i in range(len(mine)):
            mine[i] = keys[row, i]
        _write(mine, bits[0], groups[0], turn, code, codes[row, : ends[0]], grid[row, : ends[1]])
        mine = vector[: values.shape[1]]
        for i in range(len(mine)):
            mine[i] = values[row, i]
        _write(mine, bits[1], groups[1], turn, code, codes[row, ends[0] :], grid[row, ends[1] :])


@_compiled
def _write(
    vector: Any, bits: int, groups: int, turn: bool, code: Any, codes: Any, grid: Any
) -> None:
    """Writes one vector as codes; see `write`. `vector` and `code` are overwritten."""
    size = len(vector)
    half, eighth = size // 2, size // 8
    if turn:
        _turn(vector)
    finite = True
    for k in range(groups):
        scale, zero = _fitted(vector, k, groups, bits, code)
        grid[k], grid[groups + k] = scale, zero
        finite = finite and math.isfinite(scale) and math.isfinite(zero)
    if not finite:
        # The whole vector is read back as not finite.
        for k in range(2 * groups):
            grid[k] = np.nan
    if bits == 8:
        for i in range(size):
            codes[i] = code[i]
        return
    for i in range(half):
        codes[i] = (code[i] & 15) | ((code[half + i] & 15) << 4)
    if bits == 5:
        for j in range(eighth):
            fifth = 0
            for bit in range(8):
                fifth |= (code[bit * eighth + j] >> 4) << bit
            codes[half + j] = fifth


@_compiled
def _fitted(vector: Any, k: int, groups: int, bits: int, code: Any) -> tuple[float, float]:
    """The scale and zero point of a group, rounded to half precision, and its codes.

    Args:
        vector: `[D]`.
        k: the group.
        groups: of the vector.
        bits: of a code.
        code: `[D]` uint8; the group's are written.
    """
    kind, group, most = vector.dtype.type, len(vector) // groups, 2**bits - 1
    begin, end = k * group, (k + 1) * group
    low = high = vector[begin]
    total = kind(0)
    for i in range(begin, end):
        low, high, total = min(low, vector[i]), max(high, vector[i]), total + vector[i]
    if not math.isfinite(total):
        for i in range(begin, end):
            code[i] = 0
        return kind(np.nan), kind(np.nan)
    scale = kind((high - low) / most)
    _to_nearest(vector, begin, end, scale, low, most, code)
    mean = kind(0)
    for i in range(begin, end):
        mean += code[i]
    mean /= group
    spread = together = kind(0)
    for i in range(begin, end):
        away = code[i] - mean
        spread += away * away
        together += away * vector[i]
    # Where all codes are the same there is nothing to fit.
    scale = kind(_half(together / spread if spread > 0 else scale))
    # The zero point goes with the scale as it is rounded.
    zero = kind(_half(total / group - scale * mean))
    _to_nearest(vector, begin, end, scale, zero, most, code)
    return scale, zero


@_compiled
def _to_nearest(
    vector: Any, begin: int, end: int, scale: float, zero: float, most: int, code: Any
) -> None:
    """The codes of the nearest points of a grid, for the numbers from `begin` to `end`."""
    for i in range(begin, end):
        # With a scale of 0 all codes are read back as the zero point, whatever they are.
        nearest = (vector[i] - zero) / scale if scale != 0 else vector[i] * 0
        # Not finite where the grid is not, which then is read back, whatever the code.
        code[i] = np.uint8(min(max(np.rint(nearest), 0), most)) if math.isfinite(nearest) else 0


@_compiled
def _half(number: float) -> float:
    """A number rounded to half precision, to the even one of two that are as near.

    By way of float32, as torch rounds it.
    """
    number = float(np.float32(number))
    if not math.isfinite(number):
        return number
    exponent = max(math.frexp(number)[1] - 11, _LEAST)
    rounded = math.ldexp(np.rint(math.ldexp(number, -exponent)), exponent)
    return math.copysign(np.inf, number) if abs(rounded) > _MOST else rounded
