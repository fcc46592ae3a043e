"""What a comparison writes down, one JSON line each: what was run, samples, and failures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """What is compared: one policy at one budget on one task at one context length.

    policy: the canonical spec, its budget already put in; "dense" and "no context" are the lines.
    label: the spec as given, which all budgets of one policy share.
    budget: the share that was put in; None where the policy has none or the spec's own is used.
    """

    policy: str
    label: str
    budget: float | None
    task: str
    context: int


@dataclass(frozen=True)
class Cost:
    """What one sample cost.

    prefill_seconds, prefill_flops: of reading the prompt, its last token included (see `reading`);
    no seconds where it was read for several cells at once. decode_tokens_per_second: None where
    nothing was generated. bytes_held: of the cache once all of the prompt but its last token was
    read and evicted from; bytes_peak: the most that the cache held at a forward's end, room for
    more tokens included. prompt_tokens: of this sample.
    entered: tokens that entered each layer, in both forwards. kept: slots that each layer holds
    after the prompt, the mean over its heads; None where it has a state and no slots.
    """

    prefill_seconds: float | None
    prefill_flops: float
    decode_tokens_per_second: float | None
    bytes_held: int
    bytes_peak: int
    prompt_tokens: int
    entered: tuple[int, ...]
    kept: tuple[float | None, ...]


@dataclass(frozen=True)
class SampleResult:
    """One sample of one cell."""

    cell: Cell
    sample: int
    score: float
    parts: Mapping[str, float]
    answer: str
    cost: Cost


@dataclass(frozen=True)
class Failure:
    """A cell that could not be run, and why; it is tried again when the run is resumed."""

    cell: Cell
    error: str


@dataclass(frozen=True)
class Trace:
    """Which tokens of one sample's prompt each layer of a cell holds once it was read.

    tokens: the prompt's, as text, n of them; joined they are the prompt.
    kept: for each layer of the model, which heads hold which of them: n levels of 0 to 3 as text
        (see `traces.levels`); empty for a layer that holds no slots at all.
    """

    cell: Cell
    sample: int
    tokens: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """All that a results file says.

    run: the settings, versions, machine and command, as plain JSON values.
    units: of each task's score, by its name.
    traces: of one sample of a cell, for as many cells as there are to look at.
    floors: the least that dense must score for a task to mean anything, where it has such.
    """

    run: Mapping[str, object]
    units: Mapping[str, str]
    samples: tuple[SampleResult, ...] = ()
    failures: tuple[Failure, ...] = field(default=())
    traces: tuple[Trace, ...] = ()
    floors: Mapping[str, float] = field(default_factory=dict)
