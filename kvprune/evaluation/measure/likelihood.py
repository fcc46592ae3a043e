"""The likelihood of continuations, behind contexts that were read with a cache, in batches.

A context is read first (see `reading.py`), so that policies prune and evict. Its continuation is
then scored on what the cache holds, and is read in the way in which `generate` reads new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cache.composed import ComposedCache
from ...models.devices import device_of
from .reading import forward, read_prompt

LogSoftmax = Callable[[Tensor], Tensor]


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities over the last axis, in the precision of the logits."""
    return logits.log_softmax(-1)


@dataclass(frozen=True)
class Contexts:
    """A batch of token sequences that a model has read with one cache, one row each.

    Attributes:
        model: the attached model.
        cache: the cache that has read the sequences.
        logits: `[B, V]`, behind each row's last token.
        mask: `[B, S]`, 1 for tokens; None if nothing is padding.
    """

    model: Any
    cache: ComposedCache
    logits: Tensor
    mask: Tensor | None

    def score(
        self, continuations: Sequence[Sequence[int]], log_softmax: LogSoftmax = log_softmax
    ) -> list[tuple[float, bool]]:
        """Scores one continuation of each row; the cache stays as it is.

        Args:
            continuations: B lists of token ids, any of which may be empty.
            log_softmax: computes log-probabilities from logits `[B, Q, V]`.

        Returns:
            for each row the log-likelihood, in nats, and whether greedy decoding would give just
            this continuation.
        """
        tokens, real = _right_padded(continuations, self.logits.device)
        found, greedy, start = [], [], 0
        for logits in self._logits_of(tokens):
            targets = tokens[:, start : start + logits.shape[1]]
            start += logits.shape[1]
            found.append(log_softmax(logits).gather(-1, targets[..., None])[..., 0])
            greedy.append(logits.argmax(-1) == targets)
        likely = torch.cat(found, 1).masked_fill(~real, 0).sum(-1)
        same = (torch.cat(greedy, 1) | ~real).all(-1)
        return list(zip(likely.tolist(), same.tolist(), strict=True))

    def _logits_of(self, tokens: Tensor) -> Iterator[Tensor]:
        """The logits `[B, Q, V]` that predict the tokens `[B, T]`, some at a time."""
        yield self.logits[:, None]
        # The last token is not read: nothing follows it.
        rest = tokens[:, :-1]
        if not rest.shape[1]:
            return
        cache = copy.deepcopy(self.cache)
        # If policies evict, the tokens are read one by one: tokens of one forward attend to each
        # other as if nothing were evicted between them.
        evicts = any(p.evicts for p in cache.policies)
        for some in rest.split(1 if evicts else rest.shape[1], dim=1):
            yield forward(self.model, some, cache, self.mask, some.shape[1])


def read(
    model: Any,
    cache: ComposedCache,
    contexts: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int] | None = None,
) -> Contexts:
    """Reads contexts of any lengths, padded on the left: all but their last tokens, then these.

    Args:
        model: an attached model.
        cache: an empty cache.
        contexts: B lists of token ids, none of them empty.
        prompt_lengths: B numbers of tokens, of which a budget given as a share is a share; None for
            the lengths of the contexts without their last tokens.

    Raises:
        KVPruneError: a policy cannot work on the model.
    """
    tokens, mask = _left_padded(contexts, device_of(model))
    logits = read_prompt(model, cache, tokens, mask, prompt_lengths)
    return Contexts(model, cache, logits, mask)


def _left_padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor | None]:
    """Token ids `[B, S]`, and a mask of 1 for tokens; the mask is None if no row is padded."""
    size = max(map(len, rows))
    ids = [[0] * (size - len(row)) + list(row) for row in rows]
    mask = [[0] * (size - len(row)) + [1] * len(row) for row in rows]
    whole = min(map(len, rows)) == size
    return torch.tensor(ids, device=device), None if whole else torch.tensor(mask, device=device)


def _right_padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Token ids `[B, T]`, T at least 1, and a mask `[B, T]` that is False for padding.

    The padding behind a row's end is read like tokens. No token before it sees it, and no other
    row.
    """
    size = max(1, *map(len, rows))
    ids = [[*row, *[0] * (size - len(row))] for row in rows]
    real = [[True] * len(row) + [False] * (size - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)
