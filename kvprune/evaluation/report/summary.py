"""The numbers of a report: a table for each task and context, a row for each cell."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan

from ..ledger.results import Cell, Cost, Failure, Results, SampleResult
from .pareto import front
from .statistics import interval, paired

DENSE = "dense"
LOWER = "no context"


@dataclass(frozen=True)
class Span:
    """A mean and its 95 % bootstrap interval; one sample, or a mean of NaN, has no interval."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class CellCost:
    """The cost of a sample of a cell: medians of times, means of the rest; units as in `Cost`.

    Attributes:
        seconds: prefill seconds of the samples that were read by themselves; NaN if none was.
        flops: prefill FLOPs.
        decode: tokens per second; None if nothing was generated.
        held: bytes held.
        peak: bytes at peak.
        tokens: tokens of the prompt.
        pruned: for each layer, tokens of the prompt that never entered it.
        evicted: for each layer, tokens that entered it and hold no slot after the prompt; None for
            a layer that has a state and no slots.
    """

    seconds: float
    flops: float
    decode: float | None
    held: float
    peak: float
    tokens: float
    pruned: tuple[float, ...]
    evicted: tuple[float | None, ...]


@dataclass(frozen=True)
class Row:
    """One cell.

    Attributes:
        cell: the cell.
        samples: the number of its samples.
        score: the mean score.
        difference: the paired difference to dense, on the samples that both have; None without
            dense, and for dense itself.
        recovered: the share of the way from no context to dense, on the samples that all three
            have; None without one of the lines, or if dense is no better than no context.
        cost: the cost.
        parts: means of the score's parts, by name.
        best: whether the cell is on the Pareto front of score and bytes held.
    """

    cell: Cell
    samples: int
    score: Span
    difference: Span | None
    recovered: float | None
    cost: CellCost
    parts: Mapping[str, float]
    best: bool = False

    @property
    def is_line(self) -> bool:
        """Whether this row is one of the two lines and not a policy that is compared with them."""
        return self.cell.policy in (DENSE, LOWER)


@dataclass(frozen=True)
class Table:
    """All cells of one task and context.

    Attributes:
        task: the name of the task.
        context: the context length, in tokens.
        unit: the unit of the score.
        rows: the cells: dense first, no context last.
        failures: the cells that could not be run.
        warnings: the reasons why the numbers may mean nothing.
    """

    task: str
    context: int
    unit: str
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    warnings: tuple[str, ...]

    @property
    def dense(self) -> Row | None:
        """The row of the dense model, if it was run."""
        return next((row for row in self.rows if row.cell.policy == DENSE), None)

    @property
    def lower(self) -> Row | None:
        """The row without the context, if it was run."""
        return next((row for row in self.rows if row.cell.policy == LOWER), None)


Samples = dict[int, SampleResult]


def tables(results: Results) -> list[Table]:
    """A table for each task and context: tasks in the order of the results, contexts ascending."""
    cells: dict[Cell, Samples] = {}
    for result in results.samples:
        cells.setdefault(result.cell, {})[result.sample] = result
    every = [*cells, *(failure.cell for failure in results.failures)]
    order = list(dict.fromkeys(cell.task for cell in every))
    pairs = sorted({(order.index(c.task), c.context) for c in every})
    return [_table(results, order[task], context, cells) for task, context in pairs]


def labels(results: Results) -> list[str]:
    """The labels of the policies that are compared, as they were given, in order of the results."""
    every = [r.cell for r in results.samples] + [f.cell for f in results.failures]
    return list(dict.fromkeys(c.label for c in every if c.policy not in (DENSE, LOWER)))


def _table(results: Results, task: str, context: int, cells: Mapping[Cell, Samples]) -> Table:
    place = (task, context)
    mine = {c: s for c, s in cells.items() if (c.task, c.context) == place}
    named = {c.policy: s for c, s in mine.items()}
    dense, lower = named.get(DENSE, {}), named.get(LOWER, {})
    rows = [_row(cell, mine[cell], dense, lower) for cell in _ordered(mine, labels(results))]
    failures = tuple(f for f in results.failures if (f.cell.task, f.cell.context) == place)
    warnings = tuple(_warnings(dense, lower, results.floors.get(task)))
    unit = results.units.get(task, "score")
    return Table(task, context, unit, _marked(rows), failures, warnings)


def _ordered(cells: Iterable[Cell], names: Sequence[str]) -> list[Cell]:
    def place(cell: Cell) -> tuple[bool, bool, int, float]:
        index = names.index(cell.label) if cell.label in names else 0
        largest_first = -1.0 if cell.budget is None else -cell.budget
        return cell.policy == LOWER, cell.policy != DENSE, index, largest_first

    return sorted(cells, key=place)


def _marked(rows: Sequence[Row]) -> tuple[Row, ...]:
    real = [row for row in rows if row.cell.policy != LOWER]
    best = front([(row.cost.held, row.score.mean) for row in real])
    mine = {row.cell for row, on in zip(real, best, strict=True) if on}
    return tuple(Row(**{**vars(row), "best": row.cell in mine}) for row in rows)


def _row(cell: Cell, samples: Samples, dense: Samples, lower: Samples) -> Row:
    scores = [result.score for result in samples.values()]
    names = dict.fromkeys(name for result in samples.values() for name in result.parts)
    parts = {
        name: _mean(r.parts[name] for r in samples.values() if name in r.parts) for name in names
    }
    return Row(
        cell=cell,
        samples=len(samples),
        score=_span(scores),
        difference=None if cell.policy == DENSE else _difference(samples, dense),
        recovered=_recovered(samples, dense, lower),
        cost=_cost([result.cost for result in samples.values()]),
        parts=parts,
    )


def _span(values: Sequence[float]) -> Span:
    mean = _mean(values)
    return Span(mean, *interval(values)) if len(values) > 1 and isfinite(mean) else Span(mean)


def _mean(values: Iterable[float]) -> float:
    """The mean; NaN if a value is not finite, so that a sample that overflowed is not left out."""
    every = list(values)
    return statistics.fmean(every) if all(map(isfinite, every)) else nan


def _difference(samples: Samples, baseline: Samples) -> Span | None:
    both = sorted(samples.keys() & baseline.keys())
    mine, other = ([s[i].score for i in both] for s in (samples, baseline))
    if not both:
        return None
    mean = _mean(a - b for a, b in zip(mine, other, strict=True))
    return Span(*paired(mine, other)) if len(both) > 1 and isfinite(mean) else Span(mean)


def _recovered(samples: Samples, dense: Samples, lower: Samples) -> float | None:
    every = sorted(samples.keys() & dense.keys() & lower.keys())
    if not every:
        return None
    mine, top, bottom = (_mean(s[i].score for i in every) for s in (samples, dense, lower))
    return (mine - bottom) / (top - bottom) if top > bottom else None


def _cost(costs: Sequence[Cost]) -> CellCost:
    times = [c.prefill_seconds for c in costs if c.prefill_seconds is not None]
    decode = [c.decode_tokens_per_second for c in costs if c.decode_tokens_per_second is not None]
    by_layer = list(zip(*(c.entered for c in costs), strict=True))
    kept = list(zip(*(c.kept for c in costs), strict=True))
    tokens, entered = statistics.fmean(c.prompt_tokens for c in costs), _means(by_layer)
    return CellCost(
        seconds=statistics.median(times) if times else math.nan,
        flops=statistics.fmean(c.prefill_flops for c in costs),
        decode=statistics.median(decode) if decode else None,
        held=statistics.fmean(c.bytes_held for c in costs),
        peak=statistics.fmean(c.bytes_peak for c in costs),
        tokens=tokens,
        pruned=tuple(tokens - e for e in entered),
        evicted=tuple(_less(e, k) for e, k in zip(entered, kept, strict=True)),
    )


def _less(entered: float, kept: Sequence[float | None]) -> float | None:
    """The tokens that entered a layer and hold no slot in it; None for a layer without slots."""
    slots = [n for n in kept if n is not None]
    return entered - statistics.fmean(slots) if slots else None


def _means(by_layer: Iterable[Iterable[float]]) -> list[float]:
    return [statistics.fmean(values) for values in by_layer]


def _warnings(dense: Samples, lower: Samples, floor: float | None) -> Iterable[str]:
    if not dense:
        yield "Dense was not run here, so nothing is compared with it."
        return
    mean = _mean(result.score for result in dense.values())
    if floor is not None and mean < floor:
        yield (
            f"Dense scores {mean:.3g}, below the {floor:.3g} that this task needs: the model "
            f"cannot do it, and what a policy loses does not show."
        )
    apart = _difference(dense, lower)
    if apart is not None and apart.mean <= 0:
        yield "Dense is no better than without the context: differences mean nothing here."
    elif apart is not None and apart.low is not None and apart.low <= 0:
        yield "Dense is not surely better than without the context: read differences with care."
