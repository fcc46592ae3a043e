"""A second reading of a prompt: its queries vote for slots, and nothing else of it stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..attention.inputs import Inputs, Scores
from ..attention.looks import blocks, blocks_of_repeat
from ..attention.masks import is_known, window_of
from ..models.structure import output_weight
from ..statistics import SecondReading, Votes
from ..storage.layer import SlotLayer
from ..storage.rows import RowNumbers


@dataclass(frozen=True, eq=False)
class Repeat:
    """A chunk of each row that is read a second time.

    part: the statistic that its queries vote for.
    start, stop: `[B]` int64, the columns at which each row's chunk begins and ends; equal where a
        row has none.
    seen: columns shown before the repeat.
    """

    part: SecondReading
    start: Tensor
    stop: Tensor
    seen: int

    def of_chunk(self, columns: Tensor) -> Tensor:
        """Which slots are the chunk's, `[B, 1|Hkv, S]` bool."""
        start, stop = (edge.to(columns.device)[:, None, None] for edge in (self.start, self.stop))
        return (columns >= start) & (columns < stop)

    def seen_by_queries(self, columns: Tensor, rows: RowNumbers) -> Tensor:
        """Which slots the queries are held to: sinks, the chunk's and those of the repeat."""
        sinks = (columns >= 0) & (columns < rows.begin(self.part.sinks)[:, None, None])
        return sinks | self.of_chunk(columns) | (columns >= self.seen)


def vote(
    repeat: Repeat,
    slots: SlotLayer,
    rows: RowNumbers,
    inputs: Inputs,
    scores: Scores,
    norms: Tensor | None,
    attention: nn.Module,
    dtype: torch.dtype,
) -> None:
    """Lets the queries of a repeat vote for a layer's slots, by the model's own rule.

    Args:
        repeat: the chunk.
        slots: the layer.
        rows: facts about the rows.
        inputs, scores: of the layer's attention.
        norms: see `Votes`; None where the statistic is not weighted.
        attention: the layer's.
        dtype: of statistics.
    """
    columns = slots.columns
    among = repeat.seen_by_queries(columns, rows)
    # Others take no part, so that their products need not be made.
    places = among.flatten(0, 1).any(0).nonzero()[:, 0]
    columns = columns.masked_fill(~among, -1).index_select(-1, places)
    key, value = inputs.key, inputs.value
    as_held = inputs.pieces is not None or inputs.coded is not None or inputs.turned
    if as_held:
        key, value = slots.keys, slots.values
    few = replace(
        inputs,
        key=key.index_select(2, places),
        value=value.index_select(2, places),
        held_columns=columns,
        no_gaps=False,
        turned=False,
        coded=None,
        pieces=None,
    )
    # The repeat's own slots are the last ones, and are not voted for.
    before = len(places) - few.query.shape[2]
    written = None
    if repeat.part.weighted:
        values = few.value[:, :, :before]
        written = _written(values, output_weight(attention), slots.heads, dtype)
    known = is_known(few.mask, few.local) and window_of(few.mask, few.local) is None
    if known and scores.sinks is None and few.no_padding and bool((columns >= 0).all()):
        each = blocks_of_repeat(few, scores, slots.heads, dtype)
    else:
        each = blocks(few, scores, slots.heads, dtype, newest=None)

    def votes() -> Iterator[Votes]:
        first = 0
        for block in each:
            here = slice(first, first := first + block.columns.shape[1])
            near = None if norms is None else norms[:, here]
            given, to = block.probabilities[..., :before], block.slots[..., :before]
            yield Votes(given, block.columns, to, near, written)

    _count(repeat, slots, votes(), places[:before])


def vote_by(
    repeat: Repeat,
    slots: SlotLayer,
    rows: RowNumbers,
    probabilities: Tensor,
    query_columns: Tensor,
    norms: Tensor | None,
    attention: nn.Module,
) -> None:
    """The same where a model computed the attention by itself.

    Args:
        repeat, slots, rows, norms, attention: see `vote`.
        probabilities: `[B, Hkv, G, Q, S]`, over all slots; 0 for queries that are padding.
        query_columns: `[B, Q]` int64.
    """
    columns = slots.columns
    among = repeat.seen_by_queries(columns, rows)
    given = probabilities * among[:, :, None, None]
    whole = given.sum(-1, keepdim=True)
    given = torch.where(whole > 0, given / whole, 0)
    written = None
    if repeat.part.weighted:
        written = _written(slots.values, output_weight(attention), slots.heads, given.dtype)
    places = torch.arange(columns.shape[-1], device=columns.device)
    columns = columns.masked_fill(~among, -1)
    _count(repeat, slots, iter([Votes(given, query_columns, columns, norms, written)]), places)


def _count(repeat: Repeat, slots: SlotLayer, votes: Iterator[Votes], places: Tensor) -> None:
    """Joins votes for the slots at some places `[n]` to what the layer holds."""
    found: Tensor | None = None
    for new in votes:
        found = repeat.part.votes(new, found)
    assert found is not None
    numbers = found.new_full((*found.shape[:2], slots.used), torch.inf)
    numbers.index_copy_(2, places, found)
    slots.observe(repeat.part, numbers.masked_fill(~repeat.of_chunk(slots.columns), torch.inf))


def _written(value: Tensor, weight: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """The norm of each value times the output weight of each query head.

    Args:
        value: `[B, H, S, Dv]`, as attention weights them.
        weight: `[Hq * Dv, C]`.
        heads: the key/value heads that are stored, Hkv.
        dtype: of the result.

    Returns:
        `[B, Hkv, G, S]`.
    """
    value = value.detach().to(dtype)
    rows, attended, size, width = value.shape
    weight = weight.to(value.device, dtype).unflatten(0, (attended, -1, width))
    # |v W|^2 = v (W W') v': nothing has the size of the hidden states of all slots.
    products = weight @ weight.transpose(-1, -2)
    square = torch.einsum("bhsd,hgde,bhse->bhgs", value, products, value)
    groups = attended * weight.shape[1] // heads
    return square.clamp(min=0).sqrt().reshape(rows, heads, groups, size)
