"""Looks of queries that earlier forwards read, where positions are assigned inside the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch

import kvprune
from kvprune.policies import StreamingLLM
from kvprune.policy import Ranking, SlotView, TokenPolicy
from kvprune.statistics import Queries

from ..support.models import prompt
from .test_positions import model_of

COUNT = 12
TURNS = [([4], 10), ([6, 9, 2], 6), ([2, 2], 9)]
"""The chunks of each turn's prompt, and the single tokens behind it."""
LENGTH = sum(sum(chunks) + singles for chunks, singles in TURNS)
ROWS = 2
PADDING = 2
"""The columns of padding in front of the second row."""

Seen = tuple[int, torch.Tensor, torch.Tensor]
"""Of a layer in a forward: its number, its slots' columns, and what the newest queries give."""


@dataclass(frozen=True)
class AnySlots(TokenPolicy):
    """Keeps slots that have nothing to do with each other, by head, and notes what it saw."""

    noted: list[Seen] = field(default_factory=list, compare=False)
    statistics = (Queries(COUNT),)
    positions_in_cache = True

    def rank_slots(self, slots: SlotView) -> Ranking:
        """The newest of a row stays, since a row must keep something."""
        self.noted.append((slots.layer, slots.columns.clone(), slots.looks(COUNT).clone()))
        heads = torch.arange(slots.valid.shape[1])[None, :, None]
        score = ((slots.columns * 7919 + heads * 31) % 101).double()
        return Ranking(score, slots.columns == slots.seen - 1, torch.full_like(slots.first, 7))


@dataclass(frozen=True)
class Window(StreamingLLM):
    """Sinks and a window, whose positions take the cheap way."""

    noted: list[Seen] = field(default_factory=list, compare=False)
    statistics = (Queries(COUNT),)

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Notes what it saw."""
        self.noted.append((slots.layer, slots.columns.clone(), slots.looks(COUNT).clone()))
        return super().rank_slots(slots)


class Raw:
    """Queries and keys of each layer, `[B, columns, H, D]`, before rotation."""

    def __init__(self, model: Any) -> None:
        self.size = model.config.hidden_size // model.config.num_attention_heads
        self.frequencies = model.base_model.rotary_emb.inv_freq.double()
        self.queries: list[list[torch.Tensor]] = []
        self.keys: list[list[torch.Tensor]] = []
        for layer in model.base_model.layers:
            for name, into in (("q_proj", self.queries), ("k_proj", self.keys)):
                made: list[torch.Tensor] = []
                into.append(made)
                projection = getattr(layer.self_attn, name)
                projection.register_forward_hook(lambda _, __, out, made=made: made.append(out))

    def of(self, what: list[list[torch.Tensor]], layer: int) -> torch.Tensor:
        return torch.cat(what[layer], 1).unflatten(-1, (-1, self.size))

    def turned(self, vector: torch.Tensor, by: int) -> torch.Tensor:
        """`[D]` turned by a position."""
        cosine, sine = (by * self.frequencies).cos(), (by * self.frequencies).sin()
        a, b = vector.chunk(2)
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine])


def place_of(column: int, held: Sequence[int], before: int) -> int:
    """The position of a token, from the forward's first on, by the definition.

    Args:
        column: the token's.
        held: columns in slots.
        before: the forward's first column.
    """
    if column >= before:
        return column - before
    old = [c for c in held if c < before]
    return sum(c <= column for c in old) - 1 - len(old)


def expected(raw: Raw, seen: Seen, row: int, head: int, before: int, stop: int) -> Any:
    """Probabilities `[G, w, S]` that the newest queries give a head's slots."""
    layer, columns, given = seen
    slots = columns[row, head % columns.shape[1]].tolist()
    held = [c for c in slots if c >= 0]
    queries, keys = raw.of(raw.queries, layer)[row], raw.of(raw.keys, layer)[row]
    groups, count = given.shape[2:4]
    found = torch.zeros(groups, count, len(slots), dtype=torch.float64)
    for group in range(groups):
        for number, query in enumerate(range(stop - count, stop)):
            at = place_of(query, held, before)
            turned = raw.turned(queries[query, head * groups + group], at)
            scores = torch.full((len(slots),), -torch.inf, dtype=torch.float64)
            for slot, column in enumerate(slots):
                if 0 <= column <= query:
                    key = raw.turned(keys[column, head], place_of(column, held, before))
                    scores[slot] = turned @ key / raw.size**0.5
            if scores.isfinite().any():
                found[group, number] = scores.softmax(-1)
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "policy",
    [AnySlots(), Window(2, 6, positions="cache"), Window(2, 2, positions="cache")],
    ids=["any slots", "window of 6", "window of 2"],
)
def test_older_queries_stand_where_their_tokens_now_do(policy, padded):
    """Chunks shorter than the window, and single tokens; sinks, and tokens whose slots are gone."""
    model = kvprune.attach(model_of("llama"))
    ids = prompt(ROWS, LENGTH, 3)
    # The model is tried out at the first forward, of which nothing is to be noted.
    model(ids[:, :1], past_key_values=kvprune.ComposedCache([policy]))
    raw, cache = Raw(model), kvprune.ComposedCache([policy])
    noted = policy.noted
    noted.clear()
    mask = torch.ones_like(ids)
    mask[1, : PADDING if padded else 0] = 0

    def read(count: int, begin: int) -> None:
        start, stop = cache.seen, cache.seen + count
        with torch.no_grad():
            model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        assert len(noted) == model.config.num_hidden_layers
        for seen in noted:
            given = seen[2]
            assert given.shape[3] == min(COUNT, stop - begin)
            for row, head in product(range(ROWS), range(given.shape[1])):
                first = PADDING if padded and row else 0
                if stop - given.shape[3] < first:
                    continue
                wanted = expected(raw, seen, row, head, max(start, first), stop)
                torch.testing.assert_close(given[row, head], wanted, rtol=1e-8, atol=1e-9)
        noted.clear()

    for chunks, singles in TURNS:
        begin = cache.seen
        lengths = mask[:, begin : begin + sum(chunks)].sum(1)
        with cache.prompt(lengths):
            for count in chunks:
                read(count, begin)
        for _ in range(singles):
            read(1, begin)
