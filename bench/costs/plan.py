"""The parts of a run: what each measures, under which name it is kept, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .models import LAYER, REAL

STEPS = 10
"""Single-token steps of each candidate in a turn, in parts that measure steps."""

CHUNK = 512
"""Tokens of a stream that are read at once."""

# Estimates of how long a run takes. A turn of all candidates takes `_ALL` dense prefills, a turn
# of those with a budget `_BUDGETED`, one of the field's methods `_FIELD`, and a step takes `_STEP`
# seconds.
_ALL, _BUDGETED, _STEP = 4.6, 3.0, 0.08
_FIELD, _FIELD_STEPS = 8.8, 11.0


@dataclass(frozen=True)
class Part:
    """One file of results.

    Attributes:
        name: the name of the file.
        kind: what is measured.
        context: tokens of the prompt, or of the longest stream.
        repeats: the number of turns.
        seconds: about how long the part takes on two slow cores.
        shape: the model, a shape of `models`.
        dtype: the dtype of the model.
        rows: the rows of the batch.
        budgets: slots of a layer.
        new: generated tokens.
    """

    name: str
    kind: str
    context: int
    repeats: int
    seconds: float
    shape: str = REAL
    dtype: str = "float32"
    rows: int = 1
    budgets: tuple[int, ...] = ()
    new: int = 0

    @property
    def group(self) -> str:
        """The name that `--parts` takes for all parts of a group."""
        return self.name.rsplit("-", 1)[0]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run.

    Args:
        contexts: tokens of prompts; decoding and generating begin with the longest prompt, other
            precisions and batches read the shortest.
        budgets: slots of a layer, for decoding.
        stream: tokens of the stream.
        new: generated tokens.
        repeats: turns of every part; None for as many as each part has time for.
    """

    contexts: Sequence[int] = (1024, 2048, 4096, 8192)
    budgets: Sequence[int] = (512, 1024, 2048)
    stream: int = 32768
    new: int = 128
    repeats: int | None = None

    def parts(self) -> list[Part]:
        """All parts, in the order of measuring."""
        contexts = sorted(self.contexts)
        first, last = contexts[0], contexts[-1]
        layers = [n for n in contexts if 2048 <= n <= 4096] or [first]
        parts = [
            _attach(first),
            *(_prefill("prefill", n, 5 if n < 2048 else 4 if n <= 4096 else 3) for n in contexts),
            _field(max(layers)),
            _decode(last, tuple(sorted(self.budgets))),
            _field_step(max(self.budgets), sorted(self.budgets)[len(self.budgets) // 2]),
            _whole(last, self.new),
            _stream(self.stream, min(self.budgets)),
            _prefill("bfloat16", first, 3, dtype="bfloat16"),
            _prefill("batch", first, 2, rows=4),
            *(_prefill("layer", n, 2 if n < 4096 else 1, shape=LAYER) for n in layers),
        ]
        return [part if self.repeats is None else _repeated(part, self.repeats) for part in parts]


def dense_seconds(tokens: int, shape: str = REAL, dtype: str = "float32") -> float:
    """About how many seconds a dense prefill takes on two slow cores."""
    n = tokens / 1000
    each = 5.0 * n + 0.1 * n**2 if shape == LAYER else 1.5 * n + 0.32 * n**2
    return each * (0.7 if dtype == "bfloat16" else 1.0)


def _repeated(part: Part, repeats: int) -> Part:
    return replace(part, repeats=repeats, seconds=part.seconds * (repeats + 1) / (part.repeats + 1))


def _prefill(
    group: str, context: int, repeats: int, shape: str = REAL, dtype: str = "float32", rows: int = 1
) -> Part:
    """A part in which every candidate reads the prompt; those with a budget keep an eighth."""
    each = _ALL * rows * dense_seconds(context, shape, dtype) + 5 * STEPS * _STEP
    budgets = (max(context // 8, 16),)
    seconds = each * (repeats + 1.1)
    name = f"{group}-{context}"
    return Part(name, "prefill", context, repeats, seconds, shape, dtype, rows, budgets)


def _field(context: int) -> Part:
    """A part in which the methods of the field read the prompt."""
    part = _prefill("field", context, 3)
    return replace(part, kind="field", seconds=part.seconds * _FIELD / _ALL)


def _decode(context: int, budgets: tuple[int, ...]) -> Part:
    """A part of steps on what policies kept of the longest prompt, beside dense steps."""
    repeats = 6
    reading = _BUDGETED * dense_seconds(context) + sum(map(dense_seconds, budgets))
    seconds = reading + repeats * STEPS * 4 * len(budgets) * _STEP
    return Part(f"decode-{context}", "decode", context, repeats, seconds, budgets=budgets)


def _field_step(context: int, budget: int) -> Part:
    """A part of steps on what the field's methods keep, beside dense steps."""
    # Three rounds from one seldom eviction to the next.
    repeats = 20
    seconds = _FIELD_STEPS * (dense_seconds(context) + repeats * STEPS * _STEP)
    name = f"field-step-{context}"
    return Part(name, "field-step", context, repeats, seconds, budgets=(budget,))


def _whole(context: int, new: int) -> Part:
    """A part with a prompt and the tokens that are generated behind it."""
    repeats, budgets = 3, (max(context // 8, 16),)
    each = 1.75 * dense_seconds(context) + new * (0.05 + 0.01 * context / 1000 + _STEP)
    return Part(
        f"whole-{context}", "whole", context, repeats, each * repeats, budgets=budgets, new=new
    )


def _stream(longest: int, budget: int) -> Part:
    """A part with a prompt in chunks, and steps at some of its lengths."""
    repeats, lengths = 5, len(lengths_of(longest))
    reading = 4 * longest / CHUNK * 1.4 * dense_seconds(CHUNK)
    seconds = reading + repeats * STEPS * 4 * lengths * _STEP
    return Part(f"stream-{longest}", "stream", longest, repeats, seconds, budgets=(budget,))


def _attach(context: int) -> Part:
    """A part with a dense cache on the model with and without kvprune."""
    repeats = 15
    each = 2 * (dense_seconds(context) + STEPS * _STEP)
    return Part(f"attach-{context}", "attach", context, repeats, each * (repeats + 1))


def lengths_of(longest: int) -> list[int]:
    """The lengths of a stream that are measured: two chunks, and doubled from there on."""
    lengths = [2 * CHUNK]
    while lengths[-1] * 2 <= longest:
        lengths.append(lengths[-1] * 2)
    return lengths
