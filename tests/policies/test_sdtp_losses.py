"""The losses against loops over plain floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprune.policies.sdtp import losses
from kvprune.policies.sdtp.losses import listwise_loss, ranking_loss

TARGETS = st.sampled_from([0.0, 1.0, 1.0, 2.0, -3.5])
SCORES = st.sampled_from([0.0, 0.5, 0.5, -1.25, 3.0, 40.0, -800.0])


def naive(score: list[float], target: list[float]) -> tuple[float, list[float]]:
    """The mean over all pairs i < j, and its gradient."""
    size, total = len(score), 0.0
    gradient, count = [0.0] * size, size * (size - 1) / 2
    for i in range(size):
        for j in range(i + 1, size):
            order = (target[i] > target[j]) - (target[i] < target[j])
            margin = (score[i] - score[j]) * order
            total += max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))
            slope = -order / (1 + math.exp(min(margin, 700.0)))
            gradient[i] += slope / count
            gradient[j] -= slope / count
    return total / count, gradient


def double(values: list[float]) -> torch.Tensor:
    """A leaf in float64."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@given(st.integers(2, 13), st.integers(1, 14), st.data())
def test_all_pairs_equal_a_double_loop(size, block, data):
    """Value and gradient, with ties, for sizes around the size of a block."""
    many = {"min_size": size, "max_size": size}
    score, target = data.draw(st.lists(SCORES, **many)), data.draw(st.lists(TARGETS, **many))
    leaf = double(score)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "BLOCK", block)
        loss = ranking_loss(leaf, torch.tensor(target))
        (3.0 * loss).backward()
    value, gradient = naive(score, target)
    torch.testing.assert_close(loss.item(), value, rtol=1e-12, atol=1e-12)
    expected = 3.0 * torch.tensor(gradient, dtype=torch.float64)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("pairs", [None, 50])
def test_pairs_that_tie_cost_log_2_and_have_no_gradient(pairs):
    """Nothing is to be learned of them."""
    leaf = double([0.0, 5.0, -3.0])
    loss = ranking_loss(leaf, torch.ones(3), pairs)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert torch.equal(leaf.grad, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("pairs", [None, 7])
@pytest.mark.parametrize("size", [0, 1])
def test_no_pair_is_no_loss(size, pairs):
    """0, with a gradient of 0, so that a sum of losses can be taken back."""
    leaf = torch.zeros(size, requires_grad=True)
    loss = ranking_loss(leaf, torch.zeros(size), pairs)
    loss.backward()
    assert loss.shape == () and loss.item() == 0.0
    assert leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("pairs", [None, 9])
def test_the_target_gets_no_gradient(pairs):
    """Also where it could have one."""
    score, target = double([0.1, 0.2, 0.3]), double([2.0, 1.0, 3.0])
    ranking_loss(score, target, pairs).backward()
    assert target.grad is None or not target.grad.any()
    assert score.grad is not None and score.grad.any()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_drawn_pairs_are_two_different_tokens_and_all_equally_likely(size):
    """So that their mean is an unbiased estimate; within five standard deviations."""
    count = 20_000
    one, two = losses._drawn(size, count, torch.Generator().manual_seed(1), torch.device("cpu"))
    assert not bool((one == two).any())
    found = torch.bincount(one * size + two, minlength=size * size).view(size, size)
    expected = count / (size * (size - 1))
    off = found[~torch.eye(size, dtype=torch.bool)]
    assert float((off - expected).abs().max()) <= 5 * math.sqrt(expected)


def test_drawn_pairs_estimate_the_loss_and_its_gradient():
    """Many drawn pairs come close to all pairs: 1 / sqrt(100,000) times a spread of about 1."""
    torch.manual_seed(3)
    score, target = torch.randn(9).tolist(), torch.randn(9).tolist()
    leaf, generator = double(score), torch.Generator().manual_seed(2)
    loss = ranking_loss(leaf, torch.tensor(target), 100_000, generator)
    loss.backward()
    value, gradient = naive(score, target)
    assert loss.item() == pytest.approx(value, abs=0.015)
    expected = torch.tensor(gradient, dtype=torch.float64)
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=0.01)


def test_the_generator_alone_decides_which_pairs():
    """The same seed draws the same ones, whatever torch's own generator does."""
    score, target = torch.linspace(0, 1, 30), torch.arange(30) % 7
    drawn = [
        float(ranking_loss(score, target, 5, torch.Generator().manual_seed(seed)))
        for seed in (4, 4, 5)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


SALIENCIES = st.lists(st.sampled_from([0.0, 1e-6, 0.5, 3.0, 3.0, 1e4]), min_size=3, max_size=3)


@given(st.lists(SCORES, min_size=3, max_size=3), SALIENCIES)
def test_the_listwise_loss_is_the_divergence_from_the_share_of_the_saliency(score, target):
    """Value and gradient, written out."""
    leaf, total = double(score), sum(target)
    loss = listwise_loss(leaf, torch.tensor(target, dtype=torch.float64))
    loss.backward()
    top = max(score)
    log_norm = top + math.log(sum(math.exp(s - top) for s in score))
    share = [t / total if total else 0.0 for t in target]
    value = sum(p * (math.log(p) - (s - log_norm)) for p, s in zip(share, score, strict=True) if p)
    assert loss.item() == pytest.approx(value, rel=1e-9, abs=1e-9)
    slope = [math.exp(s - log_norm) * sum(share) - p for p, s in zip(share, score, strict=True)]
    torch.testing.assert_close(
        leaf.grad, torch.tensor(slope, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


def test_the_listwise_loss_prefers_what_is_rarely_of_great_use():
    """One score for many examples: it learns the logarithm of the mean share, not a mean rank."""
    rare, common = torch.tensor([0.9, 0.05, 0.05]), torch.tensor([0.02, 0.49, 0.49])
    leaf = double([0.0, 0.0, 0.0])
    optimizer = torch.optim.Adam([leaf], lr=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        torch.stack([listwise_loss(leaf, t) for t in [rare, *[common] * 2]]).mean().backward()
        optimizer.step()
    mean = (rare + 2 * common) / 3
    torch.testing.assert_close(leaf.softmax(0).float(), mean, rtol=1e-3, atol=1e-3)
