"""Rows of one `generate` that have ended while others go on.

`generate` hands the model a padding token for such a row in each further step, and says so
nowhere: its mask goes on with ones. What it does know is what its stopping criteria answer, so
that is looked at here, and a cache takes such tokens for padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteriaList

_ON_CONFIG = "_kvprune_endings"


class Endings:
    """The rows of one `generate` that have ended.

    Args:
        pad: the id of padding.
        before: `[B]` bool, rows that had ended before this `generate`, of which nothing is asked;
            None for none.

    Attributes:
        appended: whether `generate` appends padding to rows that its stopping criteria end. Without
            an eos it does not: such rows go on with tokens of their own.
        padded: `[B]` bool, the rows whose newest token is padding; None as long as no row has
            ended.
    """

    def __init__(self, pad: Tensor, before: Tensor | None = None) -> None:
        self.pad, self.before = pad, before
        self.appended = True
        self.padded: Tensor | None = None
        self._ended: Tensor | None = None

    def note(self, ids: Tensor, done: Tensor) -> Tensor:
        """Takes down an answer of the stopping criteria.

        Args:
            ids: `[B, n]`, the newest token included.
            done: `[B]` bool, the rows that end with it.

        Returns:
            the rows that have ended, as far as `generate` does not know yet; `done` mostly.
        """
        if done.shape[0] == 1:
            return done
        if self.before is not None:
            done = done | self.before.to(done.device)
        if not self.appended:
            self.padded = self.before
            return done
        if self._ended is None:
            # A host read, where `generate` itself is about to ask whether all rows have ended.
            # It is the last one: rows that have ended do not come back.
            self._ended = done if bool(done.any()) else None
            self.padded = self.before
            return done
        self.padded = self._ended & (ids[:, -1] == self.pad.to(ids.device))
        self._ended = self._ended | done
        return done


class WatchedCriteria(StoppingCriteriaList):
    """Stopping criteria as they were, whose answers are noted."""

    def __init__(self, criteria: StoppingCriteriaList, endings: Endings) -> None:
        super().__init__(criteria)
        self._endings = endings

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`[B]` bool."""
        return self._endings.note(input_ids, super().__call__(input_ids, scores, **kwargs))


class PadsEnded(LogitsProcessor):
    """Has `generate` say padding, and nothing else, for rows that had ended before."""

    def __init__(self, ended: Tensor, pad: Tensor) -> None:
        self._ended, self._pad = ended, pad

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[B, V]`."""
        only = torch.full_like(scores, -torch.inf)
        only[:, self._pad.to(scores.device)] = 0
        return torch.where(self._ended.to(scores.device)[:, None], only, scores)


def watch(generation_config: Any, endings: Endings | None) -> None:
    """Notes on the config of one `generate`, which is a copy, who is to be told of endings."""
    setattr(generation_config, _ON_CONFIG, endings)


def watching(generation_config: Any) -> Endings | None:
    """The endings that `watch` noted."""
    found: Endings | None = getattr(generation_config, _ON_CONFIG, None)
    return found
