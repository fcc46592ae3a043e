"""Naive oracles for three eviction rules, KVzip, R-KV and DMS, written from their mathematics.

They are slow and literal, in float64, with loops throughout, and were written without sight of
the library that they check. Each covers one row of a batch, which has no padding here. A token's
*number* is its place in the row: 0, 1, ...; of two tokens the one with the larger number is the
newer. Query head q belongs to kv head q // G, with G query heads to each kv head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch


def kvzip_kept(
    scores: Sequence[Sequence[Mapping[int, float]]], budget: int, sinks: int
) -> list[list[set[int]]]:
    """Token numbers that each head of each layer keeps under KVzip, with one budget for all.

    The total is the sum, over all heads of all layers, of `budget` or of what the head holds if
    that is less. A head's tokens below `sinks` stay, and a head that holds none of those keeps
    its best token, ties to the newer; all these stay even where they exceed the total, and count
    in it. The rest of the total goes to the best of all other tokens, ties to the newer, then to
    the lower layer, then to the lower head. `scores[layer][head]` has the score of each token
    that the head holds; a head that holds nothing keeps nothing.
    """
    total = 0
    kept: list[list[set[int]]] = []
    for layer in scores:
        kept_in_layer: list[set[int]] = []
        for head in layer:
            total += min(budget, len(head))
            stay = {number for number in head if number < sinks}
            if head and not stay:
                _, best = max((score, number) for number, score in head.items())
                stay = {best}
            kept_in_layer.append(stay)
        kept.append(kept_in_layer)

    room = total - sum(len(stay) for kept_in_layer in kept for stay in kept_in_layer)
    others: list[tuple[float, int, int, int]] = []
    for at_layer, layer in enumerate(scores):
        for at_head, head in enumerate(layer):
            for number, score in head.items():
                if number not in kept[at_layer][at_head]:
                    others.append((score, number, -at_layer, -at_head))
    others.sort(reverse=True)
    for _, number, minus_layer, minus_head in others[: max(room, 0)]:
        kept[-minus_layer][-minus_head].add(number)
    return kept


def rkv_kept(
    keys: torch.Tensor,
    queries: torch.Tensor,
    query_numbers: Sequence[int],
    numbers: Sequence[int],
    budget: int,
    window: int,
    balance: float,
    kernel: int,
    similar: float,
    scaling: float,
) -> set[int]:
    """Token numbers that one kv head keeps under R-KV.

    A head that holds `budget` slots or fewer keeps them all. Any other keeps its newest `window`
    slots and, up to the budget, the best of the others by `rkv_ranks`, ties to the newer. The
    window stays even where it exceeds the budget.

    Args:
        keys: [S, D], the keys of the slots that the head holds.
        queries: [G, w', D], the newest queries of the row in the head's query heads. Of more than
            `window` only the newest `window` count.
        query_numbers: The token numbers of the w' queries.
        numbers: The token numbers of the S slots, in any order.
        budget: The number of slots to keep, the window counted.
        window: The number of newest slots that stay.
        balance: The weight of importance, from 0 to 1; redundancy has the rest.
        kernel: The odd width of the max-pooling of importance.
        similar: The cosine similarity above which two keys are alike.
        scaling: What the dot products are multiplied by.
    """
    ordered = sorted(numbers)
    if len(ordered) <= budget:
        return set(ordered)
    first_of_window = max(len(ordered) - window, 0)
    kept = set(ordered[first_of_window:])
    if budget <= window:
        return kept
    ranks = rkv_ranks(
        keys, queries, query_numbers, numbers, window, balance, kernel, similar, scaling
    )
    best_first = sorted(ranks, key=lambda number: (ranks[number], number), reverse=True)
    return kept | set(best_first[: budget - len(kept)])


def rkv_ranks(
    keys: torch.Tensor,
    queries: torch.Tensor,
    query_numbers: Sequence[int],
    numbers: Sequence[int],
    window: int,
    balance: float,
    kernel: int,
    similar: float,
    scaling: float,
) -> dict[int, float]:
    """Value that R-KV ranks each slot outside the window by, for each such token number.

    It is `balance` times the slot's importance less 1 - `balance` times its redundancy. The
    arguments are those of `rkv_kept`.
    """
    by_number = dict(zip(numbers, keys.double().tolist(), strict=True))
    if len(by_number) != len(numbers):
        raise ValueError("two slots have the same token number")
    ordered = sorted(by_number)
    others = ordered[: max(len(ordered) - window, 0)]
    if not others:
        return {}
    newest_first = sorted(
        range(len(query_numbers)), key=lambda place: query_numbers[place], reverse=True
    )
    newest = newest_first[:window]
    asked = [[head[place] for place in newest] for head in queries.double().tolist()]
    importance = rkv_importance([by_number[number] for number in others], asked, kernel, scaling)
    redundancy = rkv_redundancy([by_number[number] for number in ordered], similar)
    # The others come first in number order, so a place among them is a place among all.
    return {
        number: balance * importance[place] - (1 - balance) * redundancy[place]
        for place, number in enumerate(others)
    }


def rkv_importance(
    others: Sequence[Sequence[float]],
    queries: Sequence[Sequence[Sequence[float]]],
    kernel: int,
    scaling: float,
) -> list[float]:
    """Importance that R-KV gives each slot outside the window, in order of token number.

    For each query the logits of a slot are reduced to the largest of all query heads, and their
    softmax is over the slots outside the window. The mean over the queries follows, then the
    largest of the `kernel` slots around each one, cut at the ends. `others` are the keys of the
    slots outside the window in order of token number, and `queries` [G][w'][D].
    """
    if kernel % 2 == 0:
        raise ValueError(f"the kernel is {kernel}, which is not odd")
    asked = len(queries[0])
    if asked == 0:
        raise ValueError("importance needs one query at least")
    of_each_query: list[list[float]] = []
    for i in range(asked):
        logits = [max(scaling * _dot(head[i], key) for head in queries) for key in others]
        of_each_query.append(_softmax(logits))
    mean: list[float] = []
    for j in range(len(others)):
        mean.append(math.fsum(probabilities[j] for probabilities in of_each_query) / asked)

    reach = kernel // 2
    pooled: list[float] = []
    for j in range(len(others)):
        near = [mean[k] for k in range(j - reach, j + reach + 1) if 0 <= k < len(others)]
        pooled.append(max(near))
    return pooled


def rkv_redundancy(keys: Sequence[Sequence[float]], similar: float) -> list[float]:
    """Redundancy that R-KV gives each slot of a head, the window too, in order of token number.

    It is the softmax, over all slots, of the mean cosine similarity of a slot's key with the keys
    of all slots. A slot's similarity with itself is 0, as is that of a key of zeros. For every
    slot i the latest other slot with a similarity above `similar` has its similarity with i left
    out of its own mean; their similarity still counts in the mean of i, unless i is in turn the
    latest for it. `keys` are those of all slots in order of token number.
    """
    slots = len(keys)
    lengths = [math.sqrt(_dot(key, key)) for key in keys]
    table = [[0.0] * slots for _ in range(slots)]
    for i in range(slots):
        for j in range(slots):
            if i != j and lengths[i] > 0 and lengths[j] > 0:
                table[i][j] = _dot(keys[i], keys[j]) / (lengths[i] * lengths[j])
    for i in range(slots):
        alike = [j for j in range(slots) if j != i and table[i][j] > similar]
        if alike:
            table[i][max(alike)] = 0.0
    return _softmax([math.fsum(table[i][j] for i in range(slots)) / slots for j in range(slots)])


def dms_kept(
    scores: Mapping[int, float],
    protected: AbstractSet[int],
    newest: int,
    threshold: float,
    window: int,
) -> set[int]:
    """Token numbers that one head keeps under DMS.

    Of the tokens that the head holds, which are the keys of `scores`, those stay that are among
    the newest `window` of the row, whose newest token is `newest`, or are protected, or have a
    score of `threshold` or more. Where none would, the newest that the head holds stays.
    """
    kept: set[int] = set()
    for number, score in scores.items():
        if number > newest - window or number in protected or score >= threshold:
            kept.add(number)
    if scores and not kept:
        kept.add(max(scores))
    return kept


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    """Dot product of two vectors of the same length, added up without rounding in between."""
    return math.fsum(x * y for x, y in zip(left, right, strict=True))


def _softmax(logits: Sequence[float]) -> list[float]:
    """Softmax of a list of numbers, at least one."""
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    total = math.fsum(powers)
    return [power / total for power in powers]
