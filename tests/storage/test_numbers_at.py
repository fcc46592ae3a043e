"""Numbers of tokens find the slots that hold these."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprune.storage.buffers import numbers_at


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**16))
def test_every_slot_has_the_number_of_its_token(count, size, seed):
    """Tokens in any order and with padding anywhere, slots in any order; by heads, or for all."""
    draw = torch.Generator().manual_seed(seed)
    columns = torch.stack([torch.randperm(9, generator=draw)[:count] for _ in range(2)])
    columns[torch.rand(2, count, generator=draw) < 0.3] = -1
    slots = torch.stack([torch.randperm(9, generator=draw)[:size] for _ in range(4)]).view(2, 2, -1)
    slots[torch.rand(slots.shape, generator=draw) < 0.2] = -1
    numbers = torch.randn(2, 2, count, generator=draw)
    found = numbers_at(slots, numbers, columns)
    for row in range(2):
        for head in range(2):
            each = zip(columns[row].tolist(), numbers[row, head].tolist(), strict=True)
            said = {column: number for column, number in each if column >= 0}
            for column, number in zip(slots[row, head].tolist(), found[row, head], strict=True):
                assert bool(number.isnan()) == (column not in said)
                assert column not in said or float(number) == said[column]
    shared = numbers_at(slots[:, :1], numbers, columns)
    torch.testing.assert_close(shared[:, 0], found[:, 0], equal_nan=True)
