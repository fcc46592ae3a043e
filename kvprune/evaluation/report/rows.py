"""The results as rows: one flat dict of means for each cell, for a table or a data frame."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, nan
from statistics import fmean, median
from typing import Any

from ..ledger.ledger import Key, key_of
from ..ledger.results import Cell, Results, SampleResult
from ..specs import DENSE
from .statistics import interval


def rows_of(results: Results) -> list[dict[str, Any]]:
    """One dict for each cell.

    Cells come in the order of their first samples in the file; cells that failed without any sample
    come last. A number that was not measured is None. The keys:

        task, context, policy, label, budget: the cell
        unit: the unit of the task's score
        samples: the number of samples
        score, score_low, score_high: the mean and its 95 % bootstrap interval
        difference, difference_low, difference_high: the same for the paired differences to
            dense, on the samples that both have
        prefill_seconds, decode_tokens_per_second: medians
        prefill_flops, bytes_held, bytes_peak, prompt_tokens: means
        share_kept: the share of the prompt that a layer's cache keeps, a mean
        pruned: for each layer, the tokens that no longer entered it, a mean
        error: the error of a cell that failed
    """
    found: dict[Key, list[SampleResult]] = {}
    cells: dict[Key, Cell] = {}
    for result in results.samples:
        cells.setdefault(key_of(result.cell), result.cell)
        found.setdefault(key_of(result.cell), []).append(result)
    for failure in results.failures:
        cells.setdefault(key_of(failure.cell), failure.cell)
    errors = {key_of(failure.cell): failure.error for failure in results.failures}
    return [
        {
            **_about(cell, results),
            **_score(found.get(key, []), found.get((DENSE, None, cell.task, cell.context), [])),
            **_cost(found.get(key, [])),
            "error": errors.get(key),
        }
        for key, cell in cells.items()
    ]


def _about(cell: Cell, results: Results) -> dict[str, Any]:
    return {
        "task": cell.task,
        "context": cell.context,
        "policy": cell.policy,
        "label": cell.label,
        "budget": cell.budget,
        "unit": results.units.get(cell.task),
    }


def _score(mine: Sequence[SampleResult], dense: Sequence[SampleResult]) -> dict[str, Any]:
    scores, other = ({r.sample: r.score for r in found} for found in (mine, dense))
    both = sorted(scores.keys() & other.keys()) if mine and mine[0].cell.policy != DENSE else []
    ends = ("", "_low", "_high")
    apart = zip(ends, _span([scores[i] - other[i] for i in both]), strict=True)
    return {
        "samples": len(scores),
        **{f"score{end}": n for end, n in zip(ends, _span([*scores.values()]), strict=True)},
        **{f"difference{end}": n for end, n in apart},
    }


def _span(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """The mean and its interval.

    One value has no interval. If a value is not finite, the mean is NaN and has no interval.
    """
    if not values:
        return None, None, None
    if not all(map(isfinite, values)):
        return nan, None, None
    return (fmean(values), *(interval(values) if len(values) > 1 else (None, None)))


def _cost(mine: Sequence[SampleResult]) -> dict[str, Any]:
    costs = [result.cost for result in mine]
    times = [c.prefill_seconds for c in costs if c.prefill_seconds is not None]
    rates = [c.decode_tokens_per_second for c in costs if c.decode_tokens_per_second is not None]
    means = ("prefill_flops", "bytes_held", "bytes_peak", "prompt_tokens")
    # A layer with a state holds no slots.
    slots = [[n for n in c.kept if n is not None] for c in costs]
    kept = [fmean(n) / c.prompt_tokens for n, c in zip(slots, costs, strict=True) if n]
    pruned = [[c.prompt_tokens - entered for entered in c.entered] for c in costs]
    return {
        "prefill_seconds": median(times) if times else None,
        "decode_tokens_per_second": median(rates) if rates else None,
        **{name: fmean(getattr(c, name) for c in costs) if costs else None for name in means},
        "share_kept": fmean(kept) if kept else None,
        "pruned": [fmean(layer) for layer in zip(*pruned, strict=True)] if pruned else None,
    }
