"""Naive oracles for three eviction rules in which every KV head keeps columns of its own.

They cover one row of a batch in one layer: slow, literal, loops throughout, and written from the
rules without sight of the library they check:

* AdaKV (arXiv 2407.11550): one budget for all heads together, shared out by score;
* ChunkKV (arXiv 2502.00299): whole chunks of neighbouring tokens, by their mean score;
* DuoAttention (arXiv 2410.10819): streaming heads keep sinks and recent tokens, others everything.

A *column* is a token's index in its row's sequence, padding included; of two columns the larger
is the newer. A token's *number* is its place in its row without the padding: 0, 1, ...

Arguments in common, each with one entry per KV head: `held`, the sorted columns that the head
holds; `score`, the score of each of them; `protected`, those that stay in any case. A `budget` is
an int, the same for each head, or a list with one int per head, and it counts the protected. A
head's *free* columns are the held ones that are not protected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from fractions import Fraction


def ada_budgets(
    score: Sequence[Mapping[int, float]],
    protected: Sequence[AbstractSet[int]],
    budget: int | Sequence[int],
    floor: float,
) -> list[int]:
    """Columns that each head may keep under AdaKV (arXiv 2407.11550), the protected counted.

    The rooms of all heads together go to the best free columns of all heads: by score, ties to
    the newer column, then to the lower head. `floor`, taken as the decimal that it prints as, is
    the part of its own room that a head has for certain; the rest goes by the best columns. The
    shares are rounded down, and what is left goes, one each, to the largest fractional parts,
    ties to the lower head. The columns that head h holds are the keys of `score[h]`.
    """
    heads = len(score)
    budgets = _budget_of_each_head(budget, heads)

    rooms: list[int] = []
    entries: list[tuple[float, int, int]] = []
    for h in range(heads):
        free = [column for column in score[h] if column not in protected[h]]
        rooms.append(max(budgets[h] - len(protected[h]), 0))
        for column in free:
            entries.append((score[h][column], column, -h))
    total = min(sum(rooms), len(entries))

    top = [0] * heads
    # A head without protected columns has its best one in any case.
    first = [
        max(entry for entry in entries if entry[2] == -h)
        for h in range(heads)
        if rooms[h] and not protected[h]
    ]
    others = sorted((entry for entry in entries if entry not in first), reverse=True)
    for _, _, minus_h in (first + others)[:total]:
        top[-minus_h] += 1

    sure = Fraction(str(floor))
    shares = [top[h] * (1 - sure) + sure * rooms[h] for h in range(heads)]
    rounded = [math.floor(share) for share in shares]
    left = total - sum(rounded)
    for h in sorted(range(heads), key=lambda h: (rounded[h] - shares[h], h))[:left]:
        rounded[h] += 1
    # What a head does not have goes to the next best ones of all heads.
    best_first = [sorted((e for e in entries if e[2] == -h), reverse=True) for h in range(heads)]
    rounded = [min(rounded[h], len(best_first[h])) for h in range(heads)]
    next_best = [entry for h in range(heads) for entry in best_first[h][rounded[h] :]]
    for _, _, minus_h in sorted(next_best, reverse=True)[: total - sum(rounded)]:
        rounded[-minus_h] += 1
    return [len(protected[h]) + rounded[h] for h in range(heads)]


def ada_keep(
    held: Sequence[Sequence[int]],
    score: Sequence[Mapping[int, float]],
    protected: Sequence[AbstractSet[int]],
    budget: int | Sequence[int],
    floor: float,
) -> list[list[int]]:
    """Columns that each head keeps under AdaKV (arXiv 2407.11550), sorted.

    A head keeps its protected columns and, up to its budget from `ada_budgets`, its best free
    ones, ties going to the newer column.
    """
    heads = len(held)
    held_score = [{column: score[h][column] for column in held[h]} for h in range(heads)]
    budgets = ada_budgets(held_score, protected, budget, floor)
    kept: list[list[int]] = []
    for h in range(heads):
        free = [column for column in held[h] if column not in protected[h]]
        room = budgets[h] - len(protected[h])
        kept.append(sorted([*protected[h], *_best_first(free, score[h])[:room]]))
    return kept


def chunk_keep(
    held: Sequence[Sequence[int]],
    score: Sequence[Mapping[int, float]],
    protected: Sequence[AbstractSet[int]],
    budget: int | Sequence[int],
    size: int,
    number: Mapping[int, int] | Sequence[int],
) -> list[list[int]]:
    """Columns that each head keeps under ChunkKV (arXiv 2502.00299), sorted.

    A chunk is all tokens with the same `number[column] // size`, and its score in a head is the
    mean score of its free columns there. A head whose budget covers all that it holds keeps it
    all. Any other keeps its protected columns and takes the free columns of whole chunks, from
    the best chunk on, ties to the newer, up to the first chunk that does not fit. Where the very
    first does not fit, the head takes the best free columns of that chunk that do, ties to the
    newer column.

    Raises:
        ValueError: A head has no room for free columns, and no protected ones, so that it would
            keep nothing.
    """
    budgets = _budget_of_each_head(budget, len(held))
    kept: list[list[int]] = []
    for h in range(len(held)):
        if budgets[h] >= len(held[h]):
            kept.append(sorted(held[h]))
            continue
        room = max(budgets[h] - len(protected[h]), 0)

        chunks: dict[int, list[int]] = {}
        for column in held[h]:
            if column not in protected[h]:
                chunks.setdefault(number[column] // size, []).append(column)
        ranked: list[tuple[float, int]] = []
        for chunk, columns in chunks.items():
            mean = math.fsum(score[h][column] for column in columns) / len(columns)
            ranked.append((mean, chunk))
        ranked.sort(reverse=True)

        taken: list[int] = []
        for _, chunk in ranked:
            columns = chunks[chunk]
            if len(taken) + len(columns) > room:
                if not taken:
                    taken = _best_first(columns, score[h])[:room]
                break
            taken.extend(columns)
        if not taken and not protected[h]:
            raise ValueError(f"head {h} would keep nothing: no room and nothing protected")
        kept.append(sorted([*protected[h], *taken]))
    return kept


def duo_keep(
    held: Sequence[Sequence[int]],
    streaming: Sequence[bool],
    sinks: int,
    recent: int,
    number: Mapping[int, int] | Sequence[int],
) -> list[list[int]]:
    """Columns that each head keeps under DuoAttention (arXiv 2410.10819), sorted.

    A streaming head keeps the columns whose number is below `sinks`, and the `recent` newest of
    those that it holds, sinks among them or not. A retrieval head keeps everything.
    """
    kept: list[list[int]] = []
    for h in range(len(held)):
        if not streaming[h]:
            kept.append(sorted(held[h]))
            continue
        newest = sorted(held[h], reverse=True)[:recent]
        stays = [column for column in held[h] if number[column] < sinks or column in newest]
        kept.append(sorted(stays))
    return kept


def _budget_of_each_head(budget: int | Sequence[int], heads: int) -> list[int]:
    """Budgets of all heads, in a list, where one int stands for the same one in each head."""
    return [budget] * heads if isinstance(budget, int) else list(budget)


def _best_first(columns: Iterable[int], score: Mapping[int, float]) -> list[int]:
    """Columns from the best score to the worst, ties going to the newer column."""
    return sorted(columns, key=lambda column: (score[column], column), reverse=True)
