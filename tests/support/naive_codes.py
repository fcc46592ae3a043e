"""What a quantised store reads back of a vector, number by number, in float64 or float32."""

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


def read_back(vector: np.ndarray, bits: int, group: int, rotate: bool) -> np.ndarray:
    """The vector that is read back where this one was written."""
    vector = turned(vector) if rotate else vector
    found = np.zeros_like(vector)
    for start in range(0, len(vector), group):
        numbers = vector[start : start + group]
        low, high = min(numbers), max(numbers)
        # Half precision.
        scale = type(low)(np.float16((high - low) / (2**bits - 1)))
        zero = type(low)(np.float16(low))
        for i, number in enumerate(numbers):
            code = 0 if scale == 0 else round((number - zero) / scale)
            found[start + i] = zero + scale * min(max(code, 0), 2**bits - 1)
    return turned(found) if rotate else found


def read_back_all(states: np.ndarray, bits: int, group: int, rotate: bool) -> np.ndarray:
    """The same of all vectors `[..., D]`."""
    flat = states.reshape(-1, states.shape[-1])
    back = [read_back(vector, bits, group, rotate) for vector in flat]
    return np.stack(back).reshape(states.shape)
