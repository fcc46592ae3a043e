"""What is known of a prompt's tokens once its last layer has attended: what heads score them by.

For each key/value head of each layer: the logarithms of the probabilities that the newest queries
gave a slot, by query head, as means over three groups of these queries (the newest; the newest
`near`; those before them, if there are any), and the logarithm of the norm of its value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.policy import SlotView

LEAST = 1e-8
"""A probability, or a norm, below this counts as this: its logarithm is finite."""
GROUPS = 3
QUERIES, NEAR = 64, 16
"""How many of the newest queries look, and how many of these make the second group."""


def of_slots(view: SlotView, queries: int, near: int, dtype: torch.dtype) -> Tensor:
    """The features of a layer's slots.

    Args:
        view: of the layer, behind a policy with `Queries(queries)`.
        queries: how many newest queries look.
        near: how many of them make the second group.
        dtype: of the result, and of all that is computed.

    Returns:
        `[B, Hkv, 3 G + 1, S]`.
    """
    looks = view.looks(queries).to(dtype)
    # A query that a row does not have gives nothing to anything.
    there = looks.sum(-1, keepdim=True) > 0
    groups = [slice(-1, None), slice(-near, None), slice(0, -near)]
    means = [
        looks[:, :, :, group].sum(3) / there[:, :, :, group].sum(3).clamp(min=1) for group in groups
    ]
    given = torch.stack(means, 3).flatten(2, 3)
    norms = view.values.to(dtype).norm(dim=-1)
    return torch.cat([given, norms[:, :, None]], 2).clamp(min=LEAST).log()


PLACES = 4


def of_places(view: SlotView, dtype: torch.dtype) -> Tensor:
    """The features of a token's place in its row: `[B, 4, 1|Hkv, S]`, 0 for empty slots."""
    number = view.positions.clamp(min=0).to(dtype)
    count = view.prompt_length.to(dtype)[:, None, None]
    behind = (count - number).clamp(min=1)
    every = [behind.log(), (number + 1).log(), number / count, count.log().expand_as(number)]
    return torch.stack(every, 1).masked_fill(~view.valid[:, None], 0)
