"""What runs one cell: a model that is read by, and nothing that is written."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...cache.composed import ComposedCache
from ...models.fingerprint import model_digest
from ..command import without_places
from ..explain import pieces
from ..ledger.results import Cell, Failure, SampleResult, Trace
from ..measure.flops import Flops
from ..measure.reader import CacheReader, Reading, own_prefill_flops
from ..measure.traces import trace_of
from ..specs import DENSE, parse
from ..tasks.base import Sample, Task

NO_CONTEXT = "no context"
LINES = (DENSE, NO_CONTEXT)
"""The upper and the lower line, which every comparison has."""


@dataclass(frozen=True)
class Job:
    """A cell, and those of its samples that are still to be run."""

    cell: Cell
    task: Task
    samples: tuple[Sample, ...]


class Worker:
    """An attached model and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @cached_property
    def digest(self) -> str:
        """What tells the model from others; reads all of its weights."""
        return model_digest(self.model)

    @cached_property
    def flops(self) -> Flops:
        """What the model's parts cost; measuring it is also the process's first, slow forward."""
        return Flops.measured(self.model)

    def run(self, job: Job) -> Iterator[SampleResult | Trace]:
        """A cell's samples, one after the other, and what became of its first one's tokens.

        Raises:
            Exception: whatever the policy, the task or the model raises.
        """
        policies = [] if job.cell.policy in LINES else parse(job.cell.policy)
        bare = job.cell.policy == NO_CONTEXT
        prompts = [sample.bare if bare else sample.prompt for sample in job.samples]
        own: dict[int, float] = {}
        # Where the longest prompt costs a policy nothing of its own, no prompt does.
        longest = max(prompts, key=len)
        nothing = own_prefill_flops(self.model, longest, policies) == 0.0
        for sample, prompt in zip(job.samples, prompts, strict=True):
            if not nothing and len(prompt) not in own:
                own[len(prompt)] = own_prefill_flops(self.model, prompt, policies)
            reader = self.reader(Reading.of(self.model, prompt, ComposedCache(policies)))
            if sample.number == 0 and policies:
                texts = texts_of(self.tokenizer, prompt)
                yield trace_of(reader.cache, texts, job.cell, sample.number)
            yield self.asked(job, sample, reader, own.get(len(prompt), 0.0))

    def reader(self, lead: Reading) -> CacheReader:
        """One that has read the rest of a prompt."""
        return CacheReader(self.model, self.tokenizer, lead)

    def asked(self, job: Job, sample: Sample, reader: CacheReader, own: float) -> SampleResult:
        """A sample's result; own: see `CacheReader.cost`."""
        score = job.task.score(sample, reader)
        cost = reader.cost(self.flops, own)
        return SampleResult(
            job.cell,
            sample.number,
            float(score.value),
            {name: float(part) for name, part in score.parts.items()},
            score.answer,
            cost,
        )


def texts_of(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The texts of tokens, which joined are the whole where the tokenizer can say so."""
    text = tokenizer.decode(ids)
    if getattr(tokenizer, "is_fast", False):
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if list(again["input_ids"]) == list(ids):
            return pieces(text, again["offset_mapping"])
    return tuple(tokenizer.decode([i]) for i in ids)


def failed(cell: Cell, error: BaseException) -> Failure:
    """What is written of an error: its kind, what it says, and where it came up."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({without_places(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return Failure(cell, without_places(f"{type(error).__name__}: {error}") + where)
