"""What a quantised store reads back of a vector, number by number, in float64."""

from __future__ import annotations

import math

import numpy as np


def sign(i: int, j: int) -> int:
    """The entry of Sylvester's matrix before it is scaled: by how many bits i and j share."""
    return -1 if bin(i & j).count("1") % 2 else 1


def turned(vector: np.ndarray) -> np.ndarray:
    """The vector turned by Hadamard's matrix, in blocks of a power of two."""
    size = len(vector)
    block = 1
    while size % (2 * block) == 0:
        block *= 2
    found = np.zeros_like(vector)
    for start in range(0, size, block):
        for j in range(block):
            each = (vector[start + i] * sign(i, j) for i in range(block))
            found[start + j] = sum(each) / math.sqrt(block)
    return found


def half(number: float) -> float:
    """The number in half precision, by way of float32, as torch rounds it."""
    return float(np.float16(np.float32(number)))


def codes_of(numbers: list[float], scale: float, zero: float, most: int) -> list[int]:
    """The number of the point of the grid that is nearest to each number."""
    if scale == 0:
        return [0 for _ in numbers]
    return [min(max(round((number - zero) / scale), 0), most) for number in numbers]


def read_back(vector: np.ndarray, bits: int, group: int, rotate: bool) -> np.ndarray:
    """The vector that is read back where this one was written."""
    vector = turned(vector) if rotate else vector
    found, most = np.zeros_like(vector), 2**bits - 1
    for start in range(0, len(vector), group):
        numbers = [float(number) for number in vector[start : start + group]]
        low, high = min(numbers), max(numbers)
        scale, zero = (high - low) / most, low
        codes = codes_of(numbers, scale, zero, most)
        # The line through the points (code, number) that is nearest to them.
        mean, middle = sum(codes) / group, sum(numbers) / group
        spread = sum((code - mean) ** 2 for code in codes)
        if spread > 0:
            each = zip(codes, numbers, strict=True)
            scale = sum((code - mean) * number for code, number in each) / spread
        scale = half(scale)
        zero = half(middle - scale * mean)
        codes = codes_of(numbers, scale, zero, most)
        found[start : start + group] = [zero + scale * code for code in codes]
    return turned(found) if rotate else found


def read_back_all(states: np.ndarray, bits: int, group: int, rotate: bool) -> np.ndarray:
    """The same of all vectors `[..., D]`."""
    flat = states.reshape(-1, states.shape[-1])
    back = [read_back(vector, bits, group, rotate) for vector in flat]
    return np.stack(back).reshape(states.shape)
