"""The losses of token scores: the paper's ranking loss (section 3.3), and a listwise loss.

The ranking loss counts every pair of tokens alike, although most pairs are of tokens that hardly
matter. The listwise loss weighs tokens by their saliency.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024


def ranking_loss(
    score: Tensor,
    target: Tensor,
    pairs: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The ranking loss: how badly scores order the tokens, as a mean over the pairs of tokens.

    `mean over i < j of log(1 + exp(-(s_i - s_j) * sign(t_i - t_j)))`: this is L_r of the paper,
    divided by the number of pairs so that it does not grow with the length. A pair that ties in
    `target` costs log 2 and has no gradient.

    Args:
        score: `[N]` float; gets the gradient.
        target: `[N]`, the true saliency; gets no gradient.
        pairs: how many pairs to draw, and to take the mean over (uniformly, with replacement; the
            estimate is unbiased); None for all pairs, in blocks, in O(N) memory.
        generator: the random generator that draws the pairs.

    Returns:
        a scalar, 0 where N is below 2.
    """
    if score.shape[0] < 2:
        return score.sum() * 0.0
    if pairs is None:
        loss: Tensor = _AllPairs.apply(score, target.detach())
        return loss
    one, two = _drawn(score.shape[0], pairs, generator, score.device)
    order = torch.sign(target[one] - target[two]).to(score.dtype)
    return F.softplus(-(score[one] - score[two]) * order).mean()


def listwise_loss(score: Tensor, target: Tensor) -> Tensor:
    """The listwise loss: how far the scores' softmax is from each token's share of the saliency.

    `sum over i of p_i * log(p_i / softmax(s)_i)` with `p = t / sum(t)`: this is the listwise loss
    of ListNet (Cao et al., 2007, section 4.2, its top-one probability), less its least value. A
    head learns the logarithm of a token's expected share, so that a token that is rarely of great
    use comes before a token that is always of a little use.

    Args:
        score: `[N]` float; gets the gradient.
        target: `[N]`, the true saliency, not negative; gets no gradient.

    Returns:
        a scalar, 0 where nothing is salient.
    """
    share = target.detach().to(score.dtype)
    share = share / share.sum().clamp(min=torch.finfo(score.dtype).tiny)
    return F.kl_div(score.log_softmax(0), share, reduction="sum")


def _drawn(
    size: int, pairs: int, generator: torch.Generator | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The indices of two different tokens for each of `pairs` random pairs, `[pairs]` each."""
    one = torch.randint(size, (pairs,), generator=generator)
    gap = torch.randint(1, size, (pairs,), generator=generator)
    return one.to(device), ((one + gap) % size).to(device)


class _AllPairs(torch.autograd.Function):
    """The ranking loss over all ordered pairs, which counts each pair twice.

    The forward makes the gradient as well.
    """

    @staticmethod
    def forward(ctx: Any, score: Tensor, target: Tensor) -> Tensor:
        size = score.shape[0]
        total, gradient = score.new_zeros(()), torch.empty_like(score)
        for start in range(0, size, BLOCK):
            rows = slice(start, start + BLOCK)
            order = torch.sign(target[rows, None] - target[None]).to(score.dtype)
            margin = (score[rows, None] - score[None]) * order
            total = total + F.softplus(-margin).sum()
            gradient[rows] = -(torch.sigmoid(-margin) * order).sum(-1)
        # A token with itself is no pair; it has added log 2 to the total and no gradient.
        itself = F.softplus(score.new_zeros(())) * size
        count = size * (size - 1)
        ctx.save_for_backward(gradient * (2 / count))
        return (total - itself) / count

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None
