"""Results of a comparison that nobody ran: as many as a real one has, and as uneven."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvprune.evaluation.ledger.results import Cell, Cost, Results, SampleResult, Trace
from kvprune.evaluation.measure.traces import packed

LAYERS, BYTES = 30, 46_080
POLICIES = {
    "h2o(heavy=0.1,recent=0.1)": 0.5,
    "streaming(sinks=4,window=508)": 0.9,
    "sdtp+h2o": 0.35,
    "snapkv(window=32)": 0.3,
    "streaming(window=508)|h2o(heavy=256,recent=256)": 0.6,
    "sdtp": 0.25,
}
"""How much of the way to no context each loses at a budget of nothing."""

BUDGETS = (0.5, 0.25, 0.125)
TASKS = {"needle": ("recall", 0.95, 0.02), "squad": ("nats a token", -1.3, -3.9)}
TASKS["words"] = ("F1", 0.21, 0.17)
"""Unit, dense, and no context."""

RUN: dict[str, object] = {
    "model": "SmolLM2-135M-Instruct",
    "date": "2026-11-25 10:59",
    "command": 'kvprune compare --policies "sdtp+h2o" "streaming(window=508)|h2o(heavy=256)" '
    "--tasks needle squad words --context 1024 2048 --budgets 0.5 0.25 0.125 --samples 50",
    "seed": 0,
    "dtype": "float32",
    "device": "cpu",
    "versions": {"kvprune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "machine": "x86_64, 2 threads",
}


def cells(tasks: Sequence[str], contexts: Sequence[int], budgets: Sequence[float]) -> list[Cell]:
    """Both lines, and each policy at each budget; "sdtp" has none."""
    found = []
    for task in tasks:
        for context in contexts:
            found += [Cell(line, line, None, task, context) for line in ("dense", "no context")]
            for label in POLICIES:
                for budget in (None,) if label == "sdtp" else budgets:
                    spec = label if budget is None else f"{label}@{budget}"
                    found.append(Cell(spec, label, budget, task, context))
    return found


def made_up(
    tasks: Sequence[str] = tuple(TASKS),
    contexts: Sequence[int] = (1024, 2048),
    budgets: Sequence[float] = BUDGETS,
    samples: int = 50,
    seed: int = 0,
) -> Results:
    """A whole comparison; traces of the first sample at the last context of the first task."""
    draw = random.Random(seed)
    every = cells(tasks, contexts, budgets)
    measured = tuple(_sample(cell, i, draw) for cell in every for i in range(samples))
    traces = tuple(
        _trace(cell, seed)
        for cell in every
        if cell.policy not in ("dense", "no context")
        and (cell.task, cell.context) == (tasks[0], contexts[-1])
    )
    units = {task: TASKS[task][0] for task in tasks}
    return Results(RUN, units, measured, traces=traces, floors={"needle": 0.6, "words": 0.3})


def _share(cell: Cell) -> float:
    if cell.policy == "dense":
        return 1.0
    return 0.65 if cell.budget is None else cell.budget


def _sample(cell: Cell, number: int, draw: random.Random) -> SampleResult:
    unit, top, bottom = TASKS[cell.task]
    lost = POLICIES.get(cell.label, 0.0) * (1 - _share(cell)) ** 1.5
    mean = bottom if cell.policy == "no context" else top + lost * (bottom - top)
    # The sample's own difficulty is the same for all policies, which pairing is to find.
    hard = random.Random(f"{cell.task} {cell.context} {number}").gauss(0, 1)
    if unit == "recall":
        score = float(mean + 0.12 * hard + draw.gauss(0, 0.1) > 0.5)
    else:
        score = mean + (0.6 * hard + draw.gauss(0, 0.1)) * (1 if unit == "nats a token" else 0.05)
    parts = {"first half": score - 0.1, "second half": score + 0.1} if cell.task == "squad" else {}
    return SampleResult(cell, number, score, parts, "an answer", _cost(cell, number, draw))


def _cost(cell: Cell, number: int, draw: random.Random) -> Cost:
    # The sample's, whatever the policy.
    tokens = 40 if cell.policy == "no context" else cell.context - 5 - 7 * number % 50
    prunes = "sdtp" in cell.label
    stages = [max(0, i // 3 - 1) if prunes else 0 for i in range(LAYERS)]
    entered = [int(tokens * 0.93**stage) for stage in stages]
    share = 1.0 if cell.policy in ("no context", "sdtp") else _share(cell)
    kept = tuple(float(min(e, round(tokens * share))) for e in entered)
    flops = 2.7e8 * sum(entered) / LAYERS + 2.0e4 * sum(e * e for e in entered) / LAYERS
    held = int(sum(kept) * BYTES / LAYERS)
    seconds = flops / 1.5e11 * draw.lognormvariate(0, 0.08) * (1.3 if "h2o" in cell.label else 1)
    decode = None if cell.task == "squad" else draw.gauss(15 + 4 * (1 - share), 0.7)
    peak = int(held + tokens * BYTES / LAYERS)
    return Cost(seconds, flops, decode, held, peak, tokens, tuple(entered), kept)


TEXT = "The parliament building was designed by the architect in <b>Edinburgh</b> & so on ."


def tokens(count: int) -> tuple[str, ...]:
    """A text of so many tokens, with what HTML must not take for its own."""
    words = TEXT.split()
    return tuple((" " if i else "") + words[i * i * 3 % 101 % len(words)] for i in range(count))


def _trace(cell: Cell, seed: int) -> Trace:
    count, share = cell.context - 30, _share(cell)
    draw = np.random.default_rng([seed, len(cell.label)])
    liked = draw.gumbel(size=count)
    kept = tuple(packed(_layer(cell, liked, share, draw)) for _ in range(LAYERS))
    return Trace(cell, 0, tokens(count), kept)


def _layer(cell: Cell, liked: Any, share: float, draw: np.random.Generator) -> Any:
    """A window, or what each of three heads likes best with the newest quarter of the budget."""
    count = len(liked)
    if cell.label.startswith("streaming(sinks"):
        column = np.arange(count)
        return np.where((column < 4) | (column > count * (1 - share)), 3, 0).astype(np.uint8)
    score = liked + 0.7 * draw.gumbel(size=(3, count))
    score[:, -int(count * share / 4) :] += 5
    top = np.argsort(-score, axis=1)[:, : int(count * share)]
    return np.bincount(top.ravel(), minlength=count).astype(np.uint8)
