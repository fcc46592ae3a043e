"""The inputs of attention: tensors, and the columns that they belong to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.structure import Local
from ..statistics import statistic_dtype
from .coded import Coded
from .hadamard import hadamard
from .lanes import Lanes
from .masks import Mask


@dataclass(frozen=True, eq=False)
class Piece:
    """The slots of one rectangle of several; see `Lanes`.

    key: `[N, Hkv, S, D]`, by head `[N, 1, S, D]`.
    value: `[N, Hkv, S, Dv]`, likewise.
    held_columns, no_gaps, coded: as of `Inputs`.
    """

    key: Tensor
    value: Tensor
    held_columns: Tensor
    no_gaps: bool
    coded: tuple[Coded, Coded] | None = None

    @property
    def columns(self) -> Tensor:
        """`[N, 1|Hkv, S]` int64."""
        return self.held_columns[..., : self.key.shape[2]]


@dataclass(frozen=True, eq=False)
class Pieces:
    """The slots of a layer of several rectangles.

    lanes: which rows and heads stand in which.
    each: by rectangle.
    """

    lanes: Lanes
    each: tuple[Piece, ...]

    @property
    def columns(self) -> Tensor:
        """`[B, 1|Hkv, S]` int64, of all slots together."""
        return self.lanes.join([piece.columns for piece in self.each], -1)


@dataclass(frozen=True, eq=False)
class Inputs:
    """The queries of one forward at one layer, and the slots that they attend to.

    query: `[B, Hq, Q, D]`.
    key: `[B, Hkv, S, D]`.
    value: `[B, Hkv, S, Dv]`.
    mask: the model's rule.
    query_columns: `[B, Q]` int64, -1 for padding.
    held_columns: `[B, 1|Hkv, n]` int64, n at least S, -1 for an empty slot; what is behind the
        first S belongs to no slot. Slots come in no order, but those of several new tokens are the
        last ones, in order.
    no_padding: it is known that no query is padding.
    no_gaps: it is known that no slot is empty.
    count: the tokens of this forward, also those that were pruned before this layer.
    local: what the layer's queries can see; None for everything.
    turned: keys and values are turned; see `hadamard`.
    coded: keys and values of a single query's slots as they are held, where they are held as codes;
        `key` and `value` then have the shape alone, and no numbers.
    pieces: the slots, where they are of several rectangles, to which attention goes one by one;
        `key` and `value` then have the shape alone, and `held_columns` no slots.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    query_columns: Tensor
    held_columns: Tensor
    no_padding: bool
    no_gaps: bool
    count: int
    local: Local | None
    turned: bool = False
    coded: tuple[Coded, Coded] | None = None
    pieces: Pieces | None = None

    def by_piece(self, query: Tensor, columns: Tensor) -> list[Inputs]:
        """The same for each piece: its slots, and of these queries those that read them.

        Args:
            query: `[B, Hq, Q, D]`.
            columns: `[B, Q]` int64, theirs.
        """
        assert self.pieces is not None
        lanes = self.pieces.lanes
        # The single token of a forward came at the same time in every row.
        same = self.no_padding and self.count == 1 and columns is self.query_columns
        queries, asking = lanes.split_queries(query), lanes.split_columns(columns, same)
        each = zip(self.pieces.each, queries, asking, lanes.masks(self.mask), strict=True)
        # Not by `replace`, which takes several times as long, in each step and layer.
        return [
            Inputs(
                query=mine,
                key=piece.key,
                value=piece.value,
                mask=mask,
                query_columns=theirs,
                held_columns=piece.held_columns,
                no_padding=self.no_padding,
                no_gaps=piece.no_gaps,
                count=self.count,
                local=self.local,
                turned=self.turned,
                coded=piece.coded,
            )
            for piece, mine, theirs, mask in each
        ]

    @property
    def sees_all(self) -> bool:
        """Whether it is known that the newest query of each row sees every slot."""
        return self.mask.plainly_causal and self.no_gaps and self.no_padding

    @property
    def apart(self) -> bool:
        """Whether `key` and `value` have the shape alone, and no numbers."""
        return self.coded is not None or self.pieces is not None

    def with_turned_queries(self) -> Inputs:
        """The same with turned queries: products with turned keys are those of the originals."""
        return replace(self, query=hadamard(self.query), turned=False)

    def products(self, grouped: Tensor) -> Tensor:
        """`[B, Hkv, G, D]` of a single query times every key: `[B, Hkv, G, S]`.

        Of codes the queries are turned here, if keys are.
        """
        if self.coded is None:
            # This way round a CPU is quicker.
            found = torch.bmm(self.key.flatten(0, 1), grouped.flatten(0, 1).transpose(1, 2))
            return found.transpose(1, 2).view(*grouped.shape[:3], -1)
        wide = grouped.to(statistic_dtype(grouped.dtype))
        return self.coded[0].products(wide, self.turned)

    def weighted(self, probabilities: Tensor) -> Tensor:
        """The values' sums by `[B, Hkv, G, S]`: `[B, Hkv, G, Dv]`, turned back here of codes."""
        if self.coded is None:
            found = torch.bmm(probabilities.flatten(0, 1), self.value.flatten(0, 1))
            return found.view(*probabilities.shape[:3], -1)
        wide = probabilities.to(statistic_dtype(probabilities.dtype))
        return self.coded[1].weighted(wide, self.turned).to(self.query.dtype)

    @property
    def slot_columns(self) -> Tensor:
        """`[B, 1|Hkv, S]` int64; the very `held_columns` where all of them belong to slots."""
        if self.pieces is not None:
            return self.pieces.columns
        size = self.key.shape[2]
        held = self.held_columns
        return held if held.shape[-1] == size else held[..., :size]


@dataclass(frozen=True)
class Scores:
    """The steps between products of query and key, and outputs.

    scaling: what products are multiplied by.
    softcap: scores become `softcap * tanh(score / softcap)`; None for no such cap.
    sinks: `[Hq]`, attention sinks, which take their share of each query; None for none.
    dropout: the share of probabilities that are left out of outputs.
    """

    scaling: float
    softcap: float | None
    sinks: Tensor | None
    dropout: float

    def probabilities(self, scores: Tensor, sinks: Tensor | None, out: Tensor | None) -> Tensor:
        """Softmax over the slots; `sinks` `[..., 1]` take their share and are left out.

        `out` may be the scores themselves.
        """
        if sinks is None:
            return torch.softmax(scores, -1, out=out)
        return torch.cat([scores, sinks.expand_as(scores[..., :1])], -1).softmax(-1)[..., :-1]

    def capped(self, scores: Tensor) -> Tensor:
        """Scores after soft-capping."""
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def dropped(self, probabilities: Tensor, dtype: torch.dtype) -> Tensor:
        """Probabilities of a dtype after dropout."""
        probabilities = probabilities.to(dtype)
        if not self.dropout:
            return probabilities
        return torch.nn.functional.dropout(probabilities, self.dropout)


def hide(scores: Tensor, mask: Tensor) -> Tensor:
    """Applies a mask in place; what it hides stays finite (see `masks.additive`)."""
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return scores.add_(mask)
