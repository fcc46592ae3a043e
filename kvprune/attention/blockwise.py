"""Attention over the slots block by block, with what each slot receives; nothing is n x n.

The softmax runs over complete rows, so one pass over the keys gives outputs and probabilities
alike, which are summed over the queries. A block of scores stays in the processor's caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..threads import in_threads
from .inputs import Inputs, Scores, hide

BLOCK = 64
"""Queries per block, with the query heads of a key/value head stacked into the rows."""
MOST_WORKERS = 8
"""Each holds a block of scores."""


def block_by_block(inputs: Inputs, how: Scores, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Several new tokens: one row, one key/value head and one block of queries at a time.

    The new tokens' slots are the last ones, in order, so a block needs no slot behind its
    own end.

    Args:
        inputs: queries and slots.
        how: what scores are beyond products.
        dtype: of the probabilities, and of what slots receive.

    Returns:
        the output `[B, Q, Hq, Dv]`, and what each slot received `[B, Hkv, S]`.
    """
    output, found = _by_blocks(inputs, how, dtype, None)
    return output, torch.stack(found).sum(0)


_Place = tuple[int, int, int]
"""The place of a block: its row, its key/value head, its first query."""


@dataclass(frozen=True)
class Reduction:
    """What is made of probabilities in place of what slots receive.

    of: is handed a block's place, and its probabilities `[G, n, S']` over the slots up to its end.
    merged: makes one of what it gave for two blocks of a row and head.
    """

    of: Callable[[_Place, Tensor], Tensor]
    merged: Callable[[Tensor, Tensor], Tensor]


def reduced_by_block(
    inputs: Inputs, how: Scores, dtype: torch.dtype, reduction: Reduction
) -> tuple[Tensor, list[list[Tensor]]]:
    """As `block_by_block`, but what slots receive: by row and head, what a reduction gives."""
    output, found = _by_blocks(inputs, how, dtype, reduction)
    rows, heads = inputs.key.shape[:2]
    each = [
        [[worker[row, head] for worker in found if (row, head) in worker] for head in range(heads)]
        for row in range(rows)
    ]
    return output, [[reduce(reduction.merged, parts) for parts in row] for row in each]


def _by_blocks(
    inputs: Inputs, how: Scores, dtype: torch.dtype, reduction: Reduction | None
) -> tuple[Tensor, list[Any]]:
    """The output, and what each worker found of all its blocks; see `_Blocks.run`."""
    query, key, value = inputs.query, inputs.key, inputs.value
    rows, heads, count, _ = query.shape
    sinks = [] if how.sinks is None else [how.sinks]
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, *sinks))
    most = MOST_WORKERS if query.device.type == "cpu" else 1
    blocks = _Blocks(
        inputs,
        key.transpose(-1, -2).contiguous(),
        dtype,
        how,
        tracked,
        workers=min(most, torch.get_num_threads(), math.ceil(count / BLOCK)),
        reduction=reduction,
    )
    found = in_threads(blocks.run, blocks.workers, at_once=not tracked and not how.dropout)
    outputs = {place: output for outputs, _ in found for place, output in outputs.items()}
    whole = torch.stack([torch.cat([outputs[p] for p in each], 1) for each in blocks.places()])
    whole = whole.reshape(rows, heads, count, -1).transpose(1, 2)
    return whole.contiguous(), [mine for _, mine in found]


@dataclass(frozen=True)
class _Blocks:
    """All blocks of a layer.

    inputs: queries and slots, kept here since the layer has evicted by the time of a backward pass.
    key: `[B, Hkv, D, S]`.
    dtype: of the statistic.
    tracked: there are gradients. Nothing is then written to twice, and a block's scores are not
        saved but computed once more in the backward pass: those of all blocks together are n x n.
    workers: among how many the blocks are dealt out.
    reduction: what is made of probabilities; None for what slots receive.
    """

    inputs: Inputs
    key: Tensor
    dtype: torch.dtype
    how: Scores
    tracked: bool
    workers: int
    reduction: Reduction | None = None

    def places(self, first: int = 0, step: int = 1) -> Iterator[list[_Place]]:
        """The places of the blocks `first`, `first + step`, ..., by row and head."""
        starts = range(first * BLOCK, self.inputs.query.shape[2], step * BLOCK)
        for row, head in product(range(self.key.shape[0]), range(self.key.shape[1])):
            yield [(row, head, start) for start in starts]

    def run(self, worker: int) -> tuple[dict[_Place, Tensor], Any]:
        """One worker's blocks: outputs `[G, n, Dv]` by place, and mass `[B, Hkv, S]`.

        With a reduction, in place of mass what it gives, by row and head.

        They are dealt out alike in every row, so that no row's sums depend on the others.
        """
        rows, heads, _, size = self.key.shape
        groups = self.inputs.query.shape[1] // heads
        room = None if self.tracked else self.inputs.query.new_empty(groups * BLOCK * size)
        mass = self.inputs.query.new_zeros(rows, heads, size, dtype=self.dtype)
        outputs, reduced = {}, dict[tuple[int, int], Tensor]()
        for place in chain.from_iterable(self.places(worker, self.workers)):
            row, head, start = place
            count = self.inputs.query.shape[2]
            stop = min(start + BLOCK, count)
            end = size - count + stop
            states = (
                self.inputs.query[row, head * groups : (head + 1) * groups, start:stop],
                self.key[row, head, :, :end],
                self.inputs.value[row, head, :end],
            )
            outputs[place], votes = self._run_block(place, *states, room)
            if self.reduction is None:
                mass[row, head, : votes.shape[-1]] += votes
            elif (row, head) in reduced:
                reduced[row, head] = self.reduction.merged(reduced[row, head], votes)
            else:
                reduced[row, head] = votes
        return outputs, mass if self.reduction is None else reduced

    def _run_block(
        self, place: _Place, query: Tensor, key: Tensor, value: Tensor, room: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not self.tracked:
            return self._block(place, query, key, value, room)
        # Dropout has to leave out the same probabilities once more.
        found: tuple[Tensor, Tensor] = checkpoint(
            self._block,
            place,
            query,
            key,
            value,
            None,
            use_reentrant=False,
            preserve_rng_state=bool(self.how.dropout),
        )
        return found

    def _block(
        self, place: _Place, query: Tensor, key: Tensor, value: Tensor, room: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output `[G, n, Dv]`, and what the slots up to the block's end receive `[S']`.

        Of `[G, n, D]`, `[D, S']` and `[S', Dv]`.
        """
        row, head, start = place
        groups, count, _ = query.shape
        scores = self._masked(self._scores(query, key, room).to(self.dtype), row, head, start)
        sinks = self.how.sinks
        if sinks is not None:
            sinks = sinks[head * groups : (head + 1) * groups].view(-1, 1, 1).to(self.dtype)
        p = self.how.probabilities(scores, sinks, out=None if room is None else scores)
        output = self.how.dropped(p, value.dtype).flatten(0, 1) @ value
        if self.reduction is None:
            votes = self._votes(p.detach(), row, start)
        else:
            votes = self.reduction.of(place, p.detach())
        return output.view(groups, count, -1), votes

    def _scores(self, query: Tensor, key: Tensor, room: Tensor | None) -> Tensor:
        """`[G, n, D]` and `[D, S']` to `[G, n, S']`."""
        groups, count, _ = query.shape
        rows, size = groups * count, key.shape[-1]
        out = None if room is None else room[: rows * size].view(rows, size)
        products = torch.mm((query * self.how.scaling).flatten(0, 1), key, out=out)
        return self.how.capped(products).view(groups, count, size)

    def _masked(self, scores: Tensor, row: int, head: int, start: int) -> Tensor:
        """Hides what each query of `[G, n, S']` may not see."""
        groups, count, size = scores.shape
        if self.inputs.mask.plainly_causal and self.inputs.no_gaps:
            # Slots before the block are all older; within it, the upper triangle is newer.
            older = torch.ones(count, count, dtype=torch.bool, device=scores.device).tril_()
            hide(scores[..., size - count :], older)
            return scores
        slots = self.inputs.slot_columns[row : row + 1, :, :size]
        slots = slots[:, head : head + 1] if slots.shape[1] > 1 else slots
        queries = self.inputs.query_columns[row : row + 1, start : start + count]
        mask = self.inputs.mask.at(queries, slots, row)[0]
        mine = mask[head * groups : (head + 1) * groups] if mask.shape[0] > 1 else mask
        return hide(scores, mine)

    def _votes(self, probabilities: Tensor, row: int, start: int) -> Tensor:
        """The attention that slots receive, `[S']`; padding does not vote."""
        if self.inputs.no_padding:
            return probabilities.sum((0, 1))
        votes = self.inputs.query_columns[row, start : start + probabilities.shape[1]] >= 0
        return votes.to(probabilities.dtype) @ probabilities.sum(0)
