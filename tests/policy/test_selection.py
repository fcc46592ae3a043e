"""The one place where a ranking becomes a kept set, against its naive version."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprune import Ranking
from kvprune.policy.selection import first_to_go, select

from ..support.naive import naive_select

# 257 and 1.0001 are ties with their neighbours in half precision.
SCORES = st.sampled_from(
    [0.0, 1.0, 1.0, 1.0001, 2.0, -3.5, 256.0, 257.0, float("inf"), float("-inf")]
)
PRECISIONS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@st.composite
def rankings(draw):
    """Rankings with many ties, infinite scores, padding and head axes of 1 or more."""
    rows, heads, size = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 9))

    def axis() -> int:
        return draw(st.sampled_from([1, heads]))

    def tensor(values, head_axis, dtype):
        count = rows * head_axis * size
        flat = draw(st.lists(values, min_size=count, max_size=count))
        return torch.tensor(flat, dtype=dtype).view(rows, head_axis, size)

    h = axis()
    order = [draw(st.permutations(range(size))) for _ in range(rows * h)]
    columns = torch.tensor(order).view(rows, h, size)
    columns = columns.masked_fill(tensor(st.sampled_from([0, 0, 0, 1]), h, torch.bool), -1)
    score = tensor(SCORES, axis(), draw(st.sampled_from(PRECISIONS)))
    protected = tensor(st.sampled_from([0, 0, 0, 1]), axis(), torch.bool)
    shape = draw(st.sampled_from([(rows,), (rows, 1), (rows, heads)]))
    count = shape[0] * (shape[1] if len(shape) > 1 else 1)
    near = st.one_of(st.integers(0, size + 2), st.just(size - 1))
    budget = torch.tensor(draw(st.lists(near, min_size=count, max_size=count))).view(shape)
    return Ranking(score, protected, budget), columns


@given(rankings())
def test_select_equals_its_naive_version(case):
    """Protected first, then the best, ties to the newer column; exact."""
    ranking, columns = case
    kept = select(ranking, columns, columns >= 0)
    heads = max(t.shape[1] for t in (columns, ranking.score, ranking.protected))
    heads = max(heads, ranking.budget.shape[1] if ranking.budget.dim() > 1 else 1)
    assert torch.equal(kept.expand(-1, heads, -1), naive_select(ranking, columns))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("stay", [1, 2, 3])
def test_of_equal_scores_the_oldest_go(dtype, stay):
    """By column, whatever the order of slots; scores that are equal once rounded are equal."""
    score = torch.full((1, 1, 4), 256.0, dtype=dtype)
    if dtype == torch.bfloat16:
        score[0, 0, 0] = 256.5
    columns = torch.tensor([[[0, 3, 1, 2]]])
    protected = torch.zeros(1, 1, 4, dtype=torch.bool)
    kept = select(Ranking(score, protected, torch.tensor([stay])), columns, columns >= 0)
    assert sorted(columns[kept].tolist()) == list(range(4 - stay, 4))


def test_a_nan_score_never_costs_a_protected_entry():
    """In decoding NaN is not looked for; what goes then is one of the free entries."""
    score = torch.tensor([[[float("nan"), 1.0, 2.0, 3.0]]])
    protected = torch.tensor([[[False, True, True, False]]])
    columns = torch.arange(4).view(1, 1, 4)
    kept = select(Ranking(score, protected, torch.tensor([3])), columns, columns >= 0)
    assert kept[0, 0, 1] and kept[0, 0, 2] and int(kept.sum()) == 3


def test_a_nan_score_in_one_head_says_nothing_of_another():
    """Of the other head's equal scores the oldest goes."""
    score = torch.tensor([[[float("nan"), 1.0, 2.0], [1.0, 1.0, 2.0]]])
    columns = torch.tensor([[[0, 1, 2], [1, 0, 2]]])
    free = torch.ones(1, 2, 3, dtype=torch.bool)
    assert first_to_go(score, free, columns)[0, 1].tolist() == [1]
    kept = select(Ranking(score, ~free, torch.tensor([1])), columns, columns >= 0)
    assert kept[0, 1].tolist() == [False, False, True]
