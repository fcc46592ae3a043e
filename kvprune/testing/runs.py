"""Forwards of one cache on one model, and the tokens that they are fed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache.composed import ComposedCache
from ..policy.base import TokenPolicy
from ..storage.layout import parting_at_once
from ..storage.quantized import Quantized
from ..wiring.read import read
from .models import left_padded, plain_model, positions, prompt, tiny_model

STORES = (None, Quantized(8, 4), Quantized(4, 8), Quantized((5, 4), 4, rotate=False))
"""The stores with which invariants are tried; None holds keys and values as they are."""


@dataclass(frozen=True)
class Case:
    """The input of a cache: two rows of random tokens.

    Attributes:
        steps: how many tokens each forward has.
        padding: how many of a row's first columns are padding, fewer than the first forward has.
        family: the family of the tiny model.
        seed: the seed of the tokens.
        heads: the model's query heads and key/value heads.
        store: of the caches; see `ComposedCache`.
        parting: whether rows and heads stand apart in memory as soon as they keep different numbers
            of slots, as they do in long caches.
    """

    steps: tuple[int, ...]
    padding: tuple[int, int] = (0, 0)
    family: str = "llama"
    seed: int = 0
    heads: tuple[int, int] = (4, 2)
    store: Quantized | None = None
    parting: bool = False

    @property
    def model(self) -> Any:
        """The tiny model, attached."""
        return tiny_model(self.family, heads=self.heads[0], kv_heads=self.heads[1])

    @property
    def dense(self) -> Any:
        """The same tiny model, not attached."""
        return plain_model(self.family, heads=self.heads[0], kv_heads=self.heads[1])

    @property
    def ids(self) -> Tensor:
        """The tokens of both rows, `[2, total]`."""
        return prompt(2, sum(self.steps), self.seed)

    @property
    def mask(self) -> Tensor:
        """The padding mask, `[2, total]`, 0 for padding."""
        return left_padded(self.ids, list(self.padding))["attention_mask"]

    def run(self, policies: Sequence[TokenPolicy]) -> Run:
        """A new cache with these policies, which has read nothing yet."""
        return Run(self.model, policies, self.store, self.parting)

    def fed(self, policies: Sequence[TokenPolicy]) -> Run:
        """A new cache with these policies, which has read everything."""
        run = self.run(policies)
        feed(run, self.ids, self.mask, self.steps)
        return run


class Run:
    """Forwards of one cache on one model, with the padding mask kept beside it."""

    def __init__(
        self,
        model: Any,
        policies: Sequence[TokenPolicy],
        store: Quantized | None = None,
        parting: bool = False,
    ) -> None:
        self.model, self.cache = model, ComposedCache(policies, store=store)
        self.parting = parting
        self.mask: Tensor | None = None

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Runs a forward of the tokens `[B, Q]`; returns the last token's logits, `[B, V]`.

        A prompt that a policy wants read a second time is read by `kvprune.read`.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        cache = self.cache
        is_prompt = (ids.shape[1] > 1 or not cache.seen) and not cache.session.recording
        with torch.no_grad(), parting_at_once() if self.parting else nullcontext():
            if is_prompt and any(policy.reads_again for policy in cache.policies):
                return read(self.model, cache, ids, self.mask)
            logits: Tensor = self.model(
                ids,
                attention_mask=self.mask,
                position_ids=positions(self.mask)[:, -ids.shape[1] :],
                past_key_values=cache,
                logits_to_keep=1,
            ).logits
        return logits[:, -1]

    def kept(self) -> list[list[list[int]]]:
        """The kept columns by layer, and then by row and head, flattened."""
        found = []
        for index, layer in self.cache.slot_layers():
            columns = self.cache.columns(index).expand(-1, layer.heads, -1)
            found.append([[int(c) for c in head if c >= 0] for head in columns.flatten(0, 1)])
        return found


def feed(run: Run, ids: Tensor, mask: Tensor, steps: Sequence[int]) -> list[Tensor]:
    """Runs forwards of the given sizes one after the other; returns the logits of each."""
    logits, start = [], 0
    for count in steps:
        new = slice(start, start + count)
        logits.append(run(ids[:, new], mask[:, new]))
        start += count
    return logits
