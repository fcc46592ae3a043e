"""The contents of a results file: cells, with their samples, costs, failures and traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One policy at one budget on one task at one context length.

    Attributes:
        policy: the canonical spec, with its budget already put in; "dense" and "no context" are the
            lines.
        label: the spec as it was given; all budgets of one policy share it.
        budget: the share that was put in; None if the policy has no budget, or keeps its own.
        task: the name of the task.
        context: the context length, in tokens.
    """

    policy: str
    label: str
    budget: float | None
    task: str
    context: int


@dataclass(frozen=True)
class Cost:
    """The cost of one sample, or of the first question of a sample that has several.

    Attributes:
        prefill_seconds: seconds to read the prompt, its last token included (see
            `measure/reading.py`); None if the prompt was read for several cells at once.
        prefill_flops: FLOPs to read the prompt, its last token included.
        decode_tokens_per_second: None if nothing was generated.
        bytes_held: bytes of the cache once all of the prompt but its last token was read and
            evicted from; with lm-eval, once all of the prompt was (see `measure/watch.py`).
        bytes_peak: the most bytes that the cache held at a forward's end (with lm-eval also at a
            layer's), room for more tokens included.
        prompt_tokens: the number of tokens of the prompt.
        entered: for each layer, the tokens that entered it in all forwards of the prompt.
        kept: for each layer, the slots that it holds after the prompt, a mean over its heads; None
            for a layer that has a state and no slots.
        held: the same where `bytes_held` is counted, before the last token or a question was read;
            empty with lm-eval, and in files of versions that did not note it.
    """

    prefill_seconds: float | None
    prefill_flops: float
    decode_tokens_per_second: float | None
    bytes_held: int
    bytes_peak: int
    prompt_tokens: int
    entered: tuple[int, ...]
    kept: tuple[float | None, ...]
    held: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class SampleResult:
    """The result of one sample of one cell.

    Attributes:
        cell: the cell.
        sample: the number of the sample.
        score: the score, in the task's unit; higher is better.
        parts: more numbers by name; may be empty.
        answer: the generated text; "" if nothing was generated.
        cost: the cost.
    """

    cell: Cell
    sample: int
    score: float
    parts: Mapping[str, float]
    answer: str
    cost: Cost


@dataclass(frozen=True)
class Failure:
    """A cell that could not be run, and the error; a resumed run tries the cell again."""

    cell: Cell
    error: str


@dataclass(frozen=True)
class Trace:
    """The tokens of one sample's prompt that each layer of a cell holds once the prompt was read.

    Attributes:
        cell: the cell.
        sample: the number of the sample.
        tokens: the texts of the prompt's n tokens; see `texts_of` in `compare/worker.py`.
        kept: for each layer of the model, n levels of 0 to 3 as text, for how many heads hold each
            token (see `levels` in `measure/traces.py`); empty for a layer without slots.
    """

    cell: Cell
    sample: int
    tokens: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """All contents of a results file.

    Attributes:
        run: the settings, versions, machine and command, as plain JSON values.
        units: the unit of each task's score.
        samples: the results of all samples.
        failures: the cells that could not be run.
        traces: one trace for each cell that has one.
        floors: for each task that has one, the least mean that dense must score for the task to
            mean anything.
    """

    run: Mapping[str, object]
    units: Mapping[str, str]
    samples: tuple[SampleResult, ...] = ()
    failures: tuple[Failure, ...] = field(default=())
    traces: tuple[Trace, ...] = ()
    floors: Mapping[str, float] = field(default_factory=dict)
