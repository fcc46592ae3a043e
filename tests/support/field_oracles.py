"""Naive float64 oracles of key/value-cache eviction methods: slow, literal, loops throughout.

They cover one row of a batch and one layer at a time, and were written from the methods' maths
without sight of the library they check.

Shapes: q [Hq, n, d] holds the rotated queries of all n tokens so far; k [Hkv, n, d] and
v [Hkv, n, dv] hold the rotated keys and the values of the same tokens. G = Hq // Hkv query heads
share a KV head: query head h reads KV head h // G. Tokens are numbered 0 ... n - 1.

`held` lists, for each KV head, the numbers of the tokens still in the cache. A query i sees a token
j if j is held and j <= i, and every softmax over keys runs over exactly those tokens, unless a
function says otherwise. `scale` multiplies the logits, and is 1 / sqrt(d) where it is None.

Unless a function says otherwise it returns, for each KV head, the set of tokens that stay.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Held = Sequence[Sequence[int]]
History = Sequence[tuple[int, Held]]


def keep(scores: Mapping[int, float], protected: Collection[int], budget: int) -> set[int]:
    """Tokens that stay: all `protected`, then the best-scored others until `budget` in all stay.

    Ties go to the larger token number. If `budget` or more are protected, only those stay.
    The protected need no score. This is the selection shared by the methods below.
    """
    stay = {int(token) for token in protected}
    others = [int(token) for token in scores if int(token) not in stay]
    best_first = sorted(others, key=lambda token: (scores[token], token), reverse=True)
    for token in best_first:
        if len(stay) >= budget:
            break
        stay.add(token)
    return stay


def probabilities(
    q_i: npt.ArrayLike, k_h: npt.ArrayLike, held_h: Sequence[int], i: int, scale: float
) -> dict[int, float]:
    """Attention probabilities of one query, token i, over the held tokens j <= i of one KV head.

    Takes q_i [d] and k_h [n, d]. Returns token -> probability, softmax(scale * q_i . k_j), with no
    entry for a token that the query does not see, so {} if it sees none. Source: scaled dot-product
    attention (arXiv 1706.03762, equation 1) with a causal mask.
    """
    query, keys = _floats(q_i), _floats(k_h)
    return _softmax({int(j): scale * _dot(query, keys[j]) for j in sorted(held_h) if j <= i})


def snapkv(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    held: Held,
    queries: Sequence[int],
    budget: int,
    window: int = 32,
    kernel: int = 7,
    pooling: str = "max",
    scale: float | None = None,
) -> list[set[int]]:
    """Tokens that SnapKV keeps (arXiv 2404.14469, section 4 and its listing).

    `queries` are the token numbers of the newest min(window, n) queries that the layer has seen.
    A query head scores a token by the sum of its probabilities over those queries. Each KV head
    protects its newest `window` held tokens. The scores of its others, in order of token number,
    are pooled over `kernel` neighbours, then averaged over the KV head's G query heads.

    Takes q [Hq, n, d], k [Hkv, n, d].
    """
    q, k = _floats(q), _floats(k)
    scale = _scale(scale, q)
    kept = []
    for h in range(len(k)):
        last, rest = _split(held[h], window)
        pooled_by_head = [
            _pooled_window_scores(q[head], k[h], held[h], queries, rest, kernel, pooling, scale)
            for head in _query_heads(h, q, k)
        ]
        scores = {
            j: sum(pooled[j] for pooled in pooled_by_head) / len(pooled_by_head) for j in rest
        }
        kept.append(keep(scores, set(last), budget))
    return kept


def pyramid_budgets(
    budget: int, tokens: int, window: int, layers: int, beta: int | float | Fraction = 20
) -> list[int]:
    """Budgets of PyramidKV (arXiv 2406.02069, its budget allocation): one per layer, first to last.

    With C = budget - window, the exact budgets fall linearly from `most` + window in the first
    layer to `least` + window in the last: least = C / beta, most = 2 C - least, and where most is
    above tokens - window it becomes that and least becomes 2 C - most. They are made whole by
    rounding their running sums, halves up, so that they add up to layers * budget. Every layer has
    `budget` if C <= 0 or if there is one layer. A float `beta` is the decimal that it prints as.
    """
    room = Fraction(budget - window)
    if room <= 0 or layers == 1:
        return [budget] * layers
    least = room / Fraction(str(beta))
    most = 2 * room - least
    if most > tokens - window:
        most = Fraction(tokens - window)
        least = 2 * room - most

    budgets = []
    before = Fraction(0)
    for layer in range(layers):
        exact = most - (most - least) * Fraction(layer, layers - 1) + window
        after = before + exact
        budgets.append(_round_half_up(after) - _round_half_up(before))
        before = after
    return budgets


def tova(
    q: npt.ArrayLike, k: npt.ArrayLike, held: Held, budget: int, scale: float | None = None
) -> list[set[int]]:
    """Tokens that TOVA, "Token Omission Via Attention", keeps (arXiv 2401.06104, section 3).

    A token's score is the newest query's (token n - 1) probability of it, averaged over all Hq
    query heads. The heads keep the same tokens, and must hold the same. Nothing is protected.

    Takes q [Hq, n, d], k [Hkv, n, d].
    """
    q, k = _floats(q), _floats(k)
    scale = _scale(scale, q)
    tokens = _same_for_all(held)
    newest = q.shape[1] - 1
    scores = dict.fromkeys(tokens, 0.0)
    for h in range(len(k)):
        for head in _query_heads(h, q, k):
            for j, p in probabilities(q[head, newest], k[h], tokens, newest, scale).items():
                scores[j] += p / len(q)
    return [keep(scores, set(), budget) for _ in range(len(k))]


def knorm(k: npt.ArrayLike, held: Held, budget: int) -> list[set[int]]:
    """Tokens with the smallest keys, k [Hkv, n, d]: the score is -||k_j||_2 (arXiv 2406.11430)."""
    k = _floats(k)
    kept = []
    for h in range(len(k)):
        scores = {int(j): -_norm(k[h, j]) for j in held[h]}
        kept.append(keep(scores, set(), budget))
    return kept


def keydiff(k: npt.ArrayLike, held: Held, budget: int) -> list[set[int]]:
    """Tokens that KeyDiff keeps (arXiv 2504.15364): those whose keys differ most from the mean key.

    A token's score is -cos(k_j, anchor), where the anchor is the mean over the KV head's held
    tokens of their keys, each divided by its length. The cosine with a zero vector is 0.

    Takes k [Hkv, n, d].
    """
    k = _floats(k)
    kept = []
    for h in range(len(k)):
        anchor = np.zeros(k.shape[2])
        for j in held[h]:
            length = _norm(k[h, j])
            if length > 0:
                anchor += k[h, j] / length / len(held[h])
        scores = {}
        for j in held[h]:
            lengths = _norm(k[h, j]) * _norm(anchor)
            scores[int(j)] = -_dot(k[h, j], anchor) / lengths if lengths > 0 else 0.0
        kept.append(keep(scores, set(), budget))
    return kept


def observed_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    held_history: History,
    budget: int,
    scale: float | None = None,
) -> list[set[int]]:
    """Tokens with the largest column mean of the attention so far.

    `held_history` lists, in order, each query that attended in this layer and what the KV heads
    held then. The score is `attention_statistic` over "mean", and the tokens are those that the
    last entry holds. Source: H2O's summed attention (arXiv 2306.14048), here divided by the number
    of queries that could see the token.

    Takes q [Hq, n, d], k [Hkv, n, d].
    """
    statistic = attention_statistic(q, k, held_history, "mean", scale=scale)
    return [keep(scores, set(), budget) for scores in statistic]


def attention_statistic(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    held_history: History,
    over: str,
    decay: float = 1.0,
    scale: float | None = None,
) -> list[dict[int, float]]:
    """Running statistics of the attention that tokens got: for each KV head, token -> number.

    `held_history` is as in `observed_attention`. Tokens begin with 0. Then, query by query:

    * over "sum": all numbers are multiplied by `decay`, then a token's probabilities are added,
      summed over the KV head's G query heads;
    * over "max": all numbers are multiplied by `decay`, then a token's number becomes the largest
      of itself and its probabilities in the G query heads;
    * over "mean": the sum with no decay, in the end divided by the number of queries (not of heads)
      that saw the token; 0 if none did. `decay` is not read.

    With decay=0 the newest query alone counts. The result covers the tokens that the last entry
    holds. Takes q [Hq, n, d], k [Hkv, n, d]. Source: "sum" without decay is H2O's accumulated
    attention (arXiv 2306.14048); with decay=0 it is TOVA's (arXiv 2401.06104) per KV head.
    """
    if over not in ("sum", "max", "mean"):
        raise ValueError(f"over must be sum, max or mean, not {over!r}")
    q, k = _floats(q), _floats(k)
    scale = _scale(scale, q)
    result = []
    for h in range(len(k)):
        numbers: dict[int, float] = {}
        seen_by: dict[int, int] = {}
        for i, held in held_history:
            by_head = [
                probabilities(q[head, i], k[h], held[h], i, scale) for head in _query_heads(h, q, k)
            ]
            if over != "mean":
                for j in numbers:
                    numbers[j] *= decay
            for j in held[h]:
                if j > i:
                    continue
                old = numbers.get(j, 0.0)
                new = [p[j] for p in by_head]
                numbers[j] = max([old, *new]) if over == "max" else old + sum(new)
                seen_by[j] = seen_by.get(j, 0) + 1
        if over == "mean":
            numbers = {j: number / seen_by[j] for j, number in numbers.items()}
        _, last_held = held_history[-1]
        result.append({int(j): numbers.get(j, 0.0) for j in last_held[h]})
    return result


def expected_attention(
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    mean: npt.ArrayLike,
    covariance: npt.ArrayLike,
    rotation: npt.ArrayLike,
    held: Held,
    budget: int,
    sinks: int = 4,
    scale: float | None = None,
    epsilon: float = 0.0,
) -> list[set[int]]:
    """Tokens that Expected Attention keeps (arXiv 2510.00636), by their expected future use.

    A query head's future queries are Gaussian with mean mu = R mean and covariance S = R C R^T,
    where R is the mean rotation of future positions. The expected logit of a token is
    scale * mu . k_j + scale**2 / 2 * k_j^T S k_j. These pass a softmax over the KV head's held
    tokens that are no sinks; the score is (the mean over G query heads + epsilon) * ||v_j||_2.
    The held among tokens 0 ... sinks - 1 are protected.

    Takes k [Hkv, n, d], v [Hkv, n, dv], mean [Hq, d], covariance [Hq, d, d], rotation [d, d].
    """
    k, v, mean = _floats(k), _floats(v), _floats(mean)
    covariance, rotation = _floats(covariance), _floats(rotation)
    scale = _scale(scale, k)
    kept = []
    for h in range(len(k)):
        first = [int(j) for j in held[h] if j < sinks]
        rest = [int(j) for j in held[h] if j >= sinks]
        heads = _query_heads(h, mean, k)
        average = dict.fromkeys(rest, 0.0)
        for head in heads:
            mu = rotation @ mean[head]
            sigma = rotation @ covariance[head] @ rotation.T
            logits = {}
            for j in rest:
                sigma_k = np.array([_dot(row, k[h, j]) for row in sigma])
                logits[j] = _dot(mu, k[h, j]) * scale + _dot(k[h, j], sigma_k) * scale**2 / 2
            for j, p in _softmax(logits).items():
                average[j] += p / len(heads)
        scores = {j: (average[j] + epsilon) * _norm(v[h, j]) for j in rest}
        kept.append(keep(scores, set(first), budget))
    return kept


def query_moments(q_before_rotation: npt.ArrayLike, skip: int = 4) -> tuple[Array, Array]:
    """Mean [Hq, d] and covariance [Hq, d, d] of the queries [Hq, n, d] of tokens skip ... n - 1.

    The queries are those before rotation. The covariance divides by the number of tokens, not by
    one less. Source: the query statistics of Expected Attention (arXiv 2510.00636).
    """
    q = _floats(q_before_rotation)
    heads, n, d = q.shape
    if skip >= n:
        raise ValueError(f"skipping {skip} of {n} tokens leaves none")
    mean = np.zeros((heads, d))
    covariance = np.zeros((heads, d, d))
    for head in range(heads):
        for i in range(skip, n):
            mean[head] += q[head, i] / (n - skip)
        for i in range(skip, n):
            away = q[head, i] - mean[head]
            covariance[head] += np.outer(away, away) / (n - skip)
    return mean, covariance


def fastkv_tokens(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    held: Held,
    queries: Sequence[int],
    budget: int,
    window: int = 8,
    kernel: int = 7,
    pooling: str = "max",
    scale: float | None = None,
    ranked: Sequence[int] | None = None,
) -> set[int]:
    """Tokens that FastKV passes on to later layers (arXiv 2502.01068, token-selective propagation).

    The scores are SnapKV's per query head, pooled, but summed over all Hq query heads. The newest
    `window` held tokens are protected. The heads must hold the same tokens. Returns one set. Where
    a prompt comes in pieces, only the `ranked` tokens, those of the piece, can go or stay.

    Takes q [Hq, n, d], k [Hkv, n, d]; `queries` as in `snapkv`.
    """
    q, k = _floats(q), _floats(k)
    scale = _scale(scale, q)
    tokens = _same_for_all(held)
    last, rest = _split(tokens if ranked is None else ranked, window)
    scores = dict.fromkeys(rest, 0.0)
    for h in range(len(k)):
        for head in _query_heads(h, q, k):
            pooled = _pooled_window_scores(
                q[head], k[h], tokens, queries, rest, kernel, pooling, scale
            )
            for j in rest:
                scores[j] += pooled[j]
    return keep(scores, set(last), budget)


def two_stage(
    scores: Mapping[int, float],
    values: npt.ArrayLike,
    w_o_head: Sequence[npt.ArrayLike],
    protected: Collection[int],
    budget: int,
    epsilon: float = 1e-4,
) -> set[int]:
    """Tokens of one KV head that CriticalKV keeps (arXiv 2502.03805, its two-stage algorithm).

    The protected stay. Half of the room that they leave in `budget`, rounded down, goes to the best
    tokens by `scores`. The rest goes to the best of the others by (score + epsilon) times the mean
    over the query heads of ||v_j W_o||_1.

    Takes token -> score, values [n, dv], and a matrix [dv, hidden] for each of the KV head's query
    heads: the rows of the output projection that the query head feeds. Returns one set.
    """
    values = _floats(values)
    matrices = [_floats(matrix) for matrix in w_o_head]
    room = max(budget - len(set(protected)), 0)
    stage_one = keep(scores, protected, len(set(protected)) + room // 2)
    second = {}
    for j, score in scores.items():
        if j in stage_one:
            continue
        lengths = [
            sum(abs(_dot(values[j], matrix[:, c])) for c in range(matrix.shape[1]))
            for matrix in matrices
        ]
        second[int(j)] = (score + epsilon) * sum(lengths) / len(lengths)
    return keep(second, stage_one, budget)


def _pooled_window_scores(
    q_head: Array,
    k_h: Array,
    held_h: Sequence[int],
    queries: Sequence[int],
    rest: Sequence[int],
    kernel: int,
    pooling: str,
    scale: float,
) -> dict[int, float]:
    """Scores of one query head for the tokens `rest`, pooled: the shared part of SnapKV and FastKV.

    A token's score is the sum over `queries` of their probabilities over all that `held_h` lets
    them see. Takes q_head [n, d], k_h [n, d]. Source: arXiv 2404.14469, section 4.
    """
    sums = {int(j): 0.0 for j in held_h}
    for i in queries:
        for j, p in probabilities(q_head[i], k_h, held_h, i, scale).items():
            sums[j] += p
    pooled = _pool([sums[j] for j in rest], kernel, pooling)
    return dict(zip(rest, pooled, strict=True))


def _pool(sequence: Sequence[float], kernel: int, pooling: str) -> list[float]:
    """A sequence pooled over `kernel` (odd) neighbours with stride 1, as long as it was.

    "max" is the largest of the neighbours that exist; "average" is their sum divided by `kernel`,
    as if zeros lay beyond the ends.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and at least 1, not {kernel}")
    if pooling not in ("max", "average"):
        raise ValueError(f"pooling must be max or average, not {pooling!r}")
    half = kernel // 2
    pooled = []
    for place in range(len(sequence)):
        neighbours = [
            sequence[other]
            for other in range(place - half, place + half + 1)
            if 0 <= other < len(sequence)
        ]
        pooled.append(max(neighbours) if pooling == "max" else sum(neighbours) / kernel)
    return pooled


def _split(held_h: Sequence[int], window: int) -> tuple[list[int], list[int]]:
    """The newest `window` of the held tokens, and the others, both in order of token number."""
    tokens = sorted(int(j) for j in held_h)
    border = max(len(tokens) - window, 0)
    return tokens[border:], tokens[:border]


def _query_heads(h: int, q: Array, k: Array) -> list[int]:
    """The query heads that read KV head h: those with head // G == h, given q [Hq, ...]."""
    group = len(q) // len(k)
    return [head for head in range(len(q)) if head // group == h]


def _same_for_all(held: Held) -> list[int]:
    """The held tokens, sorted, of all KV heads, which must hold the same."""
    tokens = sorted(int(j) for j in held[0])
    if any(sorted(other) != tokens for other in held):
        raise ValueError("the KV heads hold different tokens")
    return tokens


def _softmax(logits: Mapping[int, float]) -> dict[int, float]:
    """The softmax of token -> logit; {} of {}."""
    if not logits:
        return {}
    largest = max(logits.values())
    weights = {j: math.exp(logit - largest) for j, logit in logits.items()}
    total = sum(weights.values())
    return {j: weight / total for j, weight in weights.items()}


def _scale(scale: float | None, vectors: Array) -> float:
    """The scale given, or else 1 / sqrt(d), d being the last size of `vectors`."""
    return 1 / math.sqrt(vectors.shape[-1]) if scale is None else scale


def _dot(a: Array, b: Array) -> float:
    """The inner product of two vectors [d], summed in order, so that equal vectors tie exactly."""
    return float(sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)))


def _norm(a: Array) -> float:
    """The Euclidean length of a vector [d]."""
    return math.sqrt(_dot(a, a))


def _round_half_up(x: Fraction) -> int:
    """The whole number nearest to x, halves up."""
    return math.floor(x + Fraction(1, 2))


def _floats(a: npt.ArrayLike) -> Array:
    """A float64 copy of an array."""
    return np.array(a, dtype=np.float64)
