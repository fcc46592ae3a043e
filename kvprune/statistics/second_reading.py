"""What slots are given while a prompt is read a second time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import KVPruneError
from .base import Block, Statistic

POSTFIX = 8
"""How many tokens of the chunk before are repeated in front of a later chunk."""


@dataclass(frozen=True, eq=False)
class Votes(Block):
    """Some queries of a second reading, and what they give to the slots before the repeat.

    The fields are those of `Block`; see `SecondReading` for the slots that share a softmax. The
    next two are None where the statistic is not weighted:

    norms: `[B, n]`, the norm (L2) of each query's hidden state, as it entered the layer.
    written: `[B, Hkv, G, S]`, the norm (L2) of each slot's value times the output weight: what the
        slot writes to the hidden state through each query head.
    """

    norms: Tensor | None = None
    written: Tensor | None = None


@dataclass(frozen=True)
class SecondReading(Statistic):
    """The most that a slot is given while its token is repeated behind the prompt, `[B, Hkv, S]`.

    `kvprune.read` reads the prompt, and then a second time, chunk by chunk: behind all that the
    cache holds stand an instruction and the chunk's tokens. Their queries vote for the chunk's
    slots. The softmax is over the row's first `sinks` slots, the chunk's and those of the repeat,
    and leaves out the rest of the prompt. Nothing else of the second reading stays. A slot whose
    token was not repeated, as one that was generated, has +inf.

    A statistic of one's own about a second reading is a frozen dataclass that derives from this
    one and overrides `votes` and `merged`, or `repeats`.

    Args:
        chunk: how many tokens are repeated at a time.
        sinks: how many of a row's first tokens the queries of every chunk see.
        weighted: whether a probability is multiplied by the norm of what the slot writes, and
            divided by the norm of the query's hidden state (KVzip+).
        first: token ids of the instruction in front of the first chunk.
        later: those in front of a later chunk; the last 8 tokens of the chunk before follow.
        reply: token ids between the instruction and a chunk, as a chat template begins a reply.

    Raises:
        KVPruneError: a chunk below 1, sinks below 0, or ids that are no whole numbers from 0 on.

    Sources: KVzip (arXiv 2505.23416), KVzap (arXiv 2601.07891) for KVzip+.
    """

    chunk: int = 2048
    sinks: int = 4
    weighted: bool = False
    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    reply: tuple[int, ...] = ()

    reads: ClassVar[str] = "second reading"
    start: ClassVar[float] = float("inf")
    checked: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if type(self.chunk) is not int or self.chunk < 1:
            raise KVPruneError(f"{name}: chunk={self.chunk!r}: expected tokens, at least 1")
        if type(self.sinks) is not int or self.sinks < 0:
            raise KVPruneError(f"{name}: sinks={self.sinks!r}: expected tokens, at least 0")
        for what in ("first", "later", "reply"):
            ids = getattr(self, what)
            tokens = isinstance(ids, tuple) and all(type(i) is int and i >= 0 for i in ids)
            if not tokens:
                raise KVPruneError(
                    f"{name}: {what}={ids!r}: expected a tuple of token ids, as "
                    f"tuple(tokenizer.encode(text, add_special_tokens=False))"
                )

    def repeats(self, ids: Sequence[int]) -> list[tuple[list[int], int, int]]:
        """What is read a second time.

        Args:
            ids: the tokens of one row that were read, without padding.

        Returns:
            for each chunk the tokens that are read, and the places in `ids` where the chunk begins
            and ends. The last tokens that are read are those of the chunk.
        """
        found = []
        for start in range(0, len(ids), self.chunk):
            stop = min(start + self.chunk, len(ids))
            asked = [*self.later, *ids[max(start - POSTFIX, 0) : start]] if start else self.first
            found.append(([*asked, *self.reply, *ids[start:stop]], start, stop))
        return found

    def votes(self, new: Votes) -> Tensor:
        """What slots are given by some queries of a chunk, `[B, Hkv, S]`."""
        given = new.probabilities
        if new.norms is not None:
            given = given / new.norms[:, None, None, :, None]
        most = given.amax(3)
        if new.written is not None:
            most = most * new.written
        return most.amax(2)

    def merged(self, one: Tensor, other: Tensor) -> Tensor:
        """What slots are given by all queries of two blocks, from what each block gives."""
        return torch.maximum(one, other)

    def join(self, held: Tensor, new: Tensor) -> Tensor:
        """Takes the new numbers, where there are any (elsewhere they are +inf)."""
        return torch.where(new == torch.inf, held, new)
