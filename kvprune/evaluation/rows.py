"""Results as rows: what each cell came to on average, flat, for a table or a data frame."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from .ledger import Key, key_of
from .results import Cell, Results, SampleResult
from .specs import DENSE
from .statistics import interval, paired


def rows_of(results: Results) -> list[dict[str, Any]]:
    """One dict for each cell, in the order in which they were begun.

    Keys: `task`, `context`, `policy`, `label`, `budget`, `unit`, `samples` (how many); `score`
    with its 95 % bootstrap interval `score_low`, `score_high`; `difference` to dense on the
    samples that both have, paired, likewise; the medians `prefill_seconds` and
    `decode_tokens_per_second`; the means `prefill_flops`, `bytes_held`, `bytes_peak`,
    `prompt_tokens`; `share_kept`, of the prompt by a layer's cache, and `pruned`, the tokens that
    no longer entered each layer, as means; and `error`. What was not measured is None.
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
    several = len(scores) > 1
    low, high = interval(list(scores.values())) if several else (None, None)
    apart: tuple[Any, ...] = (None, None, None)
    if both:
        apart = paired([scores[i] for i in both], [other[i] for i in both])
        apart = apart if len(both) > 1 else (apart[0], None, None)
    return {
        "samples": len(scores),
        "score": fmean(scores.values()) if scores else None,
        "score_low": low,
        "score_high": high,
        **dict(zip(("difference", "difference_low", "difference_high"), apart, strict=True)),
    }


def _cost(mine: Sequence[SampleResult]) -> dict[str, Any]:
    costs = [result.cost for result in mine]
    times = [c.prefill_seconds for c in costs if c.prefill_seconds is not None]
    rates = [c.decode_tokens_per_second for c in costs if c.decode_tokens_per_second is not None]
    means = ("prefill_flops", "bytes_held", "bytes_peak", "prompt_tokens")
    kept = [fmean(c.kept) / c.prompt_tokens for c in costs if c.kept]
    pruned = [[c.prompt_tokens - entered for entered in c.entered] for c in costs]
    return {
        "prefill_seconds": median(times) if times else None,
        "decode_tokens_per_second": median(rates) if rates else None,
        **{name: fmean(getattr(c, name) for c in costs) if costs else None for name in means},
        "share_kept": fmean(kept) if kept else None,
        "pruned": [fmean(layer) for layer in zip(*pruned, strict=True)] if pruned else None,
    }
