"""What layers are handed per token is gathered to the tokens that are left, wherever they are."""

from __future__ import annotations

import pytest
import torch

from kvprune.engine.arrival import Arrival
from kvprune.engine.step import Step
from kvprune.policy.moment import Moment
from kvprune.storage.rows import rows_after

from ..support.strategies import sdtp_pruner

ROWS, COUNT = 2, 7
KEPT = torch.tensor([[1, 0, 1, 0, 0, 1, 1], [0, 1, 1, 0, 1, 0, 1]], dtype=torch.bool)
LEFT = [row.nonzero().flatten().tolist() for row in KEPT]


def pruned_step() -> Step:
    """A step of two rows in which `KEPT` is left."""
    columns = torch.arange(COUNT).repeat(ROWS, 1)
    rows = rows_after(None, columns, 0, None, False)
    new = Arrival(columns, True, None, rows, False)
    asked = torch.zeros(ROWS, COUNT, dtype=torch.bool)
    step = Step([sdtp_pruner(0.6)], 4, 0, new, asked, Moment(COUNT, ends=True, first=True))
    step._narrow(KEPT, torch.zeros(ROWS, COUNT, 3))
    return step


# By shape, the axes of rows and tokens.
SHAPES = {
    (ROWS, COUNT): (0, 1),
    (1, COUNT): (0, 1),
    (ROWS, COUNT, 5): (0, 1),
    (ROWS, COUNT, COUNT): (0, 1),
    (ROWS, 1, COUNT, 1): (0, 2),
    (1, 1, COUNT, 5): (1, 2),
    (3, ROWS, COUNT): (1, 2),
    (3, 1, COUNT, 5): (1, 2),
    (3, ROWS, COUNT, 5): (1, 2),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_with_an_axis_for_the_tokens(shape):
    """Each row's own tokens, in place; a row for all of them becomes one for each."""
    value = torch.randn(shape)
    row_axis, axis = SHAPES[shape]
    got = pruned_step().align(value, value.device)
    assert got.shape[row_axis] == ROWS
    assert got.shape[axis] == len(LEFT[0])
    for row, left in enumerate(LEFT):
        own = value.select(row_axis, row if value.shape[row_axis] > 1 else 0)
        expected = own.index_select(axis - 1, torch.tensor(left))
        assert torch.equal(got.select(row_axis, row), expected)


def test_containers():
    """Tuples, lists and dicts of such, whatever else is in them."""
    value = torch.randn(ROWS, COUNT, 4)
    step = pruned_step()
    alone = step.align(value, value.device)
    for container in ((value, None), [value, 3], {"full": value, "none": None}):
        got = step.align(container, value.device)
        assert type(got) is type(container)
        first = got["full"] if isinstance(got, dict) else got[0]
        assert torch.equal(first, alone)


@pytest.mark.parametrize("shape", [(ROWS, COUNT - 1, 3), (COUNT,), (8, COUNT, 3), (ROWS, 4, COUNT)])
def test_what_is_not_per_token_stays(shape):
    """The very object, so that nothing is copied."""
    value = torch.randn(shape)
    assert pruned_step().align(value, value.device) is value


def test_before_anything_is_dropped_all_stays():
    """The very objects, also of containers."""
    columns = torch.arange(COUNT).repeat(ROWS, 1)
    new = Arrival(columns, True, None, rows_after(None, columns, 0, None, False), False)
    asked = torch.zeros(ROWS, COUNT, dtype=torch.bool)
    step = Step([sdtp_pruner(0.6)], 4, 0, new, asked, Moment(COUNT, ends=True))
    value = {"full": (torch.randn(ROWS, COUNT, 4),)}
    assert step.align(value, columns.device) is value
