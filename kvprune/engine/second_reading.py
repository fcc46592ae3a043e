"""A second reading of a prompt: its queries vote for slots, and nothing else of it stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.blockwise import Reduction, reduced_by_block
from ..attention.dispatch import as_autocast_has_it, attend, scores_for
from ..attention.hadamard import hadamard
from ..attention.inputs import Inputs, Scores
from ..attention.looks import blocks, blocks_of_repeat
from ..attention.masks import is_known, window_of
from ..attention.received import on_gpu
from ..models.devices import without_autocast
from ..models.structure import output_weight
from ..statistics import SecondReading, Votes
from ..storage.layer import SlotLayer
from ..storage.rows import RowNumbers
from .survivors import meters


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


def attend_and_vote(
    backend: str,
    attention: nn.Module,
    repeat: Repeat,
    slots: SlotLayer,
    rows: RowNumbers,
    inputs: Inputs,
    norms: Tensor | None,
    dtype: torch.dtype,
    arguments: dict[str, Any],
) -> Tensor:
    """Attention of a repeat; its queries vote for a layer's slots, by the model's own rule.

    On a CPU both come out of the same probabilities, block by block.

    Args:
        backend: see `attention.dispatch.attend`.
        attention: the layer's.
        repeat: the chunk.
        slots: the layer.
        rows: facts about the rows.
        inputs: of the layer's attention.
        norms: see `Votes`; None where the statistic is not weighted.
        dtype: of statistics.
        arguments: what else transformers passes.

    Returns:
        the output, `[B, Q, Hq, Dv]`.
    """
    scores = scores_for(attention, inputs, slots.heads, **arguments)
    several = inputs.query.shape[2] > 1
    if inputs.apart or on_gpu(inputs.query) or not several:
        output: Tensor = attend(backend, attention, inputs, **arguments)[0]
        with meters(), without_autocast(inputs.query.device):
            _vote(repeat, slots, rows, inputs, scores, norms, attention, dtype)
        return output
    turned = inputs.turned
    inputs = as_autocast_has_it(inputs.with_turned_queries() if turned else inputs)
    values = slots.values if turned else inputs.value
    sinks = scores.sinks is not None
    votes = _VotesByBlock(repeat, rows, inputs, values, norms, attention, dtype, sinks)
    output, found = reduced_by_block(inputs, scores, dtype, votes.reduction)
    whole = torch.stack([torch.stack(row) for row in found])
    if whole.shape[1] != slots.heads:
        # With latent attention (MLA) many heads read the slots of one.
        by_head = whole.unflatten(1, (slots.heads, -1)).unbind(2)
        whole = reduce(repeat.part.merged, by_head)
    _join(repeat, slots, whole, votes.places)
    return hadamard(output) if turned else output


class _VotesByBlock:
    """Votes out of the probabilities over all slots, of one row and head at a time.

    Attributes:
        places: `[n]` int64, the slots that some row and head may vote for.
        reduction: for `reduced_by_block`.
    """

    def __init__(
        self,
        repeat: Repeat,
        rows: RowNumbers,
        inputs: Inputs,
        values: Tensor,
        norms: Tensor | None,
        attention: nn.Module,
        dtype: torch.dtype,
        sinks: bool,
    ) -> None:
        columns, self._sinks = inputs.slot_columns, sinks
        among = repeat.seen_by_queries(columns, rows)
        self.places = repeat.of_chunk(columns).flatten(0, 1).any(0).nonzero()[:, 0]
        self.reduction = Reduction(self._of, repeat.part.merged)
        # Where queries are held to all that they see, nothing is divided.
        self._among = None if bool((among | (columns < 0)).all()) else among.to(dtype)
        self._part, self._columns, self._inputs = repeat.part, columns, inputs
        first, last = (int(edge) for edge in self.places[[0, -1]]) if len(self.places) else (0, -1)
        self._dense = last - first + 1 == len(self.places)
        self._first = first
        self._norms = norms
        self._written = None
        if repeat.part.weighted:
            value = values.index_select(2, self.places)
            with meters(), without_autocast(value.device):
                heads = value.shape[1]
                self._written = _written(value, output_weight(attention), heads, dtype)

    def _of(self, place: tuple[int, int, int], probabilities: Tensor) -> Tensor:
        """`[n]`, from `[G, n, S']`."""
        row, head, start = place
        count, size = probabilities.shape[1:]
        here = slice(start, start + count)
        if self._dense:
            # The repeat's own slots are the last ones, so that all of these are there.
            given = probabilities[..., self._first : self._first + len(self.places)]
        else:
            given = probabilities.index_select(-1, self.places)
        if self._among is not None:
            mine = self._among[row, min(head, self._among.shape[1] - 1), :size]
            whole = probabilities @ mine
            if self._sinks:
                # What the model's attention sinks take is theirs among fewer slots, too.
                whole = whole + (1 - probabilities.sum(-1))
            given = given / whole.masked_fill(whole == 0, 1)[..., None]
        columns = self._inputs.query_columns[row : row + 1, here]
        if not self._inputs.no_padding:
            given = given * (columns >= 0)[:, :, None]
        slots = self._columns[row : row + 1, min(head, self._columns.shape[1] - 1)]
        norms = None if self._norms is None else self._norms[row : row + 1, here]
        written = None
        if self._written is not None:
            written = self._written[row : row + 1, head : head + 1]
        to = slots[:, None].index_select(-1, self.places)
        new = Votes(given[None, None], columns, to, norms=norms, written=written)
        return self._part.votes(new)[0, 0]


def _vote(
    repeat: Repeat,
    slots: SlotLayer,
    rows: RowNumbers,
    inputs: Inputs,
    scores: Scores,
    norms: Tensor | None,
    attention: nn.Module,
    dtype: torch.dtype,
) -> None:
    """The votes of queries that attend elsewhere; see `attend_and_vote`."""
    columns = slots.columns
    among = repeat.seen_by_queries(columns, rows)
    # Others take no part, so that their products need not be made.
    places = among.flatten(0, 1).any(0).nonzero()[:, 0]
    columns = columns.masked_fill(~among, -1).index_select(-1, places)
    key, value = inputs.key, inputs.value
    as_held = inputs.apart or inputs.turned
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
            yield Votes(given, block.columns, to, norms=near, written=written)

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
        repeat, slots, rows, norms, attention: see `attend_and_vote`.
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
    votes = Votes(given, query_columns, columns, norms=norms, written=written)
    _count(repeat, slots, iter([votes]), places)


def _count(repeat: Repeat, slots: SlotLayer, votes: Iterator[Votes], places: Tensor) -> None:
    """Joins votes for the slots at some places `[n]` to what the layer holds."""
    found = reduce(repeat.part.merged, map(repeat.part.votes, votes))
    _join(repeat, slots, found, places)


def _join(repeat: Repeat, slots: SlotLayer, found: Tensor, places: Tensor) -> None:
    """Joins what slots at some places were given, `[B, Hkv, n]`."""
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
