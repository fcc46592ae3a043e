"""Kernels over codes for a CPU, compiled by numba, where it is installed.

They compute what `Coded` and `storage.codes` compute by torch's operators. Between so many
operators a decode step spends more time than within them. A kernel runs on one thread.

Indices are unsigned: numba tests each signed index for being negative, and such loops do not run in
the parallel lanes of a register.
"""

from __future__ import annotations

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

_FOUR, _ONES, _NIBBLES = np.uint64(4), np.uint64(0x0101010101010101), np.uint64(0x0F0F0F0F0F0F0F0F)
"""Of words: the bits of half a byte, the lowest bit of each byte, and the lower half of each."""


def _compiled(kernel: Kernel) -> Kernel:
    """Compiles a kernel at its first call; the machine code is kept on disk where that can be.

    Sums may be reordered, so that they run in parallel lanes of a register; NaN stays NaN.
    """
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"reassoc", "contract", "nsz"},
    }
    try:
        found: Kernel = numba.njit(cache=True, **options)(kernel)
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written to.
        found = numba.njit(**options)(kernel)
    return found


# The arguments of the three kernels that read vectors back; `Coded` says where each code is:
#   words: `[n]` uint64, eight bytes of codes each.
#   steps: how much further the codes of the next row, head and slot begin, three numbers.
#   grid: `[m]` uint16, numbers of half precision: scales and then zero points of a slot.
#   grid_steps: as `steps`.
#   bits: of a code.
#   groups: of a vector.


@_compiled
def read(
    words: Any, steps: Any, grid: Any, grid_steps: Any, bits: int, groups: int, out: Any
) -> None:
    """Reads vectors back into `out`, `[B, H, S, D]`; for the rest see above."""
    rows, heads, slots, size = out.shape
    codes, half = np.empty(size // 8, np.uint64), np.empty(1, np.uint32)
    numbers, single = codes.view(np.uint8), half.view(np.float32)
    for row in range(rows):
        for head in range(heads):
            for slot in range(slots):
                start = np.uint64(row * steps[0] + head * steps[1] + slot * steps[2])
                first = np.uint64(row * grid_steps[0] + head * grid_steps[1] + slot * grid_steps[2])
                vector = out[row, head, slot]
                _unpack(words, start, bits, codes)
                _scale(numbers, grid, first, groups, half, single, vector)


@_compiled
def products(
    words: Any,
    steps: Any,
    grid: Any,
    grid_steps: Any,
    bits: int,
    groups: int,
    queries: Any,
    out: Any,
) -> None:
    """Products of queries `[B, H, G, D]` with vectors into `out`, `[B, H, G, S]`."""
    rows, heads, each, slots = out.shape
    size = queries.shape[3]
    codes, half = np.empty(size // 8, np.uint64), np.empty(1, np.uint32)
    numbers, single = codes.view(np.uint8), half.view(np.float32)
    vector, mine = np.empty(size, out.dtype), np.empty(each * size, out.dtype)
    for row in range(rows):
        for head in range(heads):
            for g in range(each):
                for i in range(size):
                    mine[g * size + i] = queries[row, head, g, i]
            for slot in range(slots):
                start = np.uint64(row * steps[0] + head * steps[1] + slot * steps[2])
                first = np.uint64(row * grid_steps[0] + head * grid_steps[1] + slot * grid_steps[2])
                _unpack(words, start, bits, codes)
                _scale(numbers, grid, first, groups, half, single, vector)
                for g in range(each):
                    begin, total = np.uint64(g * size), out.dtype.type(0)
                    for i in range(size):
                        total += mine[begin + np.uint64(i)] * vector[np.uint64(i)]
                    out[row, head, g, slot] = total


@_compiled
def weighted(
    words: Any,
    steps: Any,
    grid: Any,
    grid_steps: Any,
    bits: int,
    groups: int,
    weights: Any,
    out: Any,
) -> None:
    """Sums of vectors by weights `[B, H, G, S]` into `out`, `[B, H, G, D]`."""
    rows, heads, each, slots = weights.shape
    size = out.shape[3]
    codes, half = np.empty(size // 8, np.uint64), np.empty(1, np.uint32)
    numbers, single = codes.view(np.uint8), half.view(np.float32)
    vector, sums = np.empty(size, out.dtype), np.empty(each * size, out.dtype)
    for row in range(rows):
        for head in range(heads):
            sums[:] = 0
            for slot in range(slots):
                start = np.uint64(row * steps[0] + head * steps[1] + slot * steps[2])
                first = np.uint64(row * grid_steps[0] + head * grid_steps[1] + slot * grid_steps[2])
                _unpack(words, start, bits, codes)
                _scale(numbers, grid, first, groups, half, single, vector)
                for g in range(each):
                    begin, weight = np.uint64(g * size), weights[row, head, g, slot]
                    for i in range(size):
                        sums[begin + np.uint64(i)] += weight * vector[np.uint64(i)]
            for g in range(each):
                for i in range(size):
                    out[row, head, g, i] = sums[g * size + i]


@_compiled
def _scale(
    numbers: Any, grid: Any, first: Any, groups: int, half: Any, single: Any, vector: Any
) -> None:
    """The vector that codes stand for.

    Args:
        numbers: `[D]` uint8, the codes.
        grid, groups: see above.
        first: the first scale.
        half, single: see `_single`.
        vector: `[D]`, written to.
    """
    group = len(vector) // groups
    for k in range(groups):
        scale = vector.dtype.type(_single(grid[first + np.uint64(k)], half, single))
        zero = vector.dtype.type(_single(grid[first + np.uint64(groups + k)], half, single))
        begin = np.uint64(k * group)
        for i in range(group):
            at = begin + np.uint64(i)
            vector[at] = numbers[at] * scale + zero


@_compiled
def _unpack(words: Any, start: Any, bits: int, vector: Any) -> None:
    """The codes of a vector, a byte each, eight of them at once.

    Args:
        words: see `read`.
        start: the vector's first word.
        bits: of a code.
        vector: `[D / 8]` uint64, written to.
    """
    count = len(vector)
    if bits == 8:
        for i in range(count):
            vector[i] = words[start + np.uint64(i)]
        return
    half = count // 2
    for i in range(half):
        word = words[start + np.uint64(i)]
        vector[i] = word & _NIBBLES
        vector[half + i] = (word >> _FOUR) & _NIBBLES
    if bits == 5:
        eighth = count // 8
        for j in range(eighth):
            word = words[start + np.uint64(half + j)]
            for bit in range(8):
                fifth = (word >> np.uint64(bit)) & _ONES
                vector[np.uint64(bit * eighth + j)] |= fifth << _FOUR


@_compiled
def _single(bits: Any, half: Any, single: Any) -> Any:
    """The number that a number of half precision stands for.

    Args:
        bits: uint16.
        half: `[1]` uint32, overwritten.
        single: the same memory as float32.
    """
    if bits & 0x7C00 == 0x7C00:
        return np.float32(np.nan)
    # The exponent counts from 127 and not from 15; a product also gets small numbers right.
    half[0] = np.uint32(bits & 0x7FFF) << np.uint32(13)
    number = single[0] * _REBASED
    return -number if bits & 0x8000 else number


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
