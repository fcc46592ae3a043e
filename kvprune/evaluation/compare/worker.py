"""The worker, which runs one cell: it reads with a model and writes no files."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from ...cache.composed import ComposedCache
from ...models.fingerprint import model_digest
from ..command import without_places
from ..explain import pieces
from ..ledger.results import Cell, Cost, Failure, SampleResult, Trace
from ..measure.flops import Flops
from ..measure.reader import CacheReader, Reading, own_prefill_flops
from ..measure.traces import trace_of
from ..specs import DENSE, cache_of
from ..tasks.base import Sample, Score, Task

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
    """An attached model and its tokenizer, with which cells are run."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @cached_property
    def digest(self) -> str:
        """A digest that tells the model from others; all of the model's weights are read for it."""
        return model_digest(self.model)

    @cached_property
    def flops(self) -> Flops:
        """The FLOPs of the model's parts; measuring them is also the first, slow forward."""
        return Flops.measured(self.model)

    def run(self, job: Job) -> Iterator[SampleResult | Trace]:
        """Runs the samples of a cell one after the other.

        Returns:
            the samples' results; before the result of sample 0 its trace, if there are policies.

        Raises:
            Exception: any error of the policy, the task or the model.
        """
        named = cache_of(DENSE if job.cell.policy in LINES else job.cell.policy)
        policies = [policy.for_tokenizer(self.tokenizer) for policy in named.policies]
        bare = job.cell.policy == NO_CONTEXT
        prompts = [sample.bare if bare else sample.prompt for sample in job.samples]
        own: dict[int, float] = {}
        # If the policies compute nothing of their own for the longest prompt, they do so for no
        # prompt.
        longest = max(prompts, key=len)
        nothing = own_prefill_flops(self.model, longest, policies) == 0.0
        for sample, prompt in zip(job.samples, prompts, strict=True):
            # What the policies act on, and one token of those behind it.
            acted = prompt[: len(prompt) + 1 - (1 if bare else sample.behind)]
            if not nothing and len(acted) not in own:
                own[len(acted)] = own_prefill_flops(self.model, acted, policies)
            asked, counted = Asked(job, sample), own.get(len(acted), 0.0)
            lead: Reading | None = None
            for question in sample.questions:
                whole, behind = (question.bare, 1) if bare else (question.prompt, question.behind)
                # Asking changes a cache. Where questions are unknown, each is asked of a copy.
                shared = bool(sample.more) and behind > 1
                if lead is None or not (shared and lead.serves(whole, behind)):
                    cache = ComposedCache(policies, store=named.store)
                    lead = Reading.of(self.model, whole, cache, behind)
                lead = lead.of_other(whole, behind)
                mine = replace(lead, cache=copy.deepcopy(lead.cache)) if shared else lead
                reader = self.reader(mine)
                if question is sample and sample.number == 0 and policies:
                    texts = texts_of(self.tokenizer, whole)
                    yield trace_of(reader.cache, texts, job.cell, sample.number)
                asked.ask(self, question, reader, counted)
            yield asked.result()

    def reader(self, lead: Reading) -> CacheReader:
        """A reader of the whole prompt; it reads the last token, which `lead` has left."""
        return CacheReader(self.model, self.tokenizer, lead)


class Asked:
    """A sample of a cell, while its questions are asked.

    Attributes:
        scores: the score of each question so far.
    """

    def __init__(self, job: Job, sample: Sample) -> None:
        self._job, self._sample = job, sample
        self.scores = list[Score]()
        self._cost: Cost | None = None

    def ask(self, worker: Worker, question: Sample, reader: CacheReader, own: float) -> None:
        """Asks the next question.

        Args:
            worker: counts the FLOPs.
            question: the sample, or what else is asked of its context.
            reader: has read the question's prompt.
            own: the FLOPs that the policies computed themselves; see `CacheReader.cost`.
        """
        self.scores.append(self._job.task.score(question, reader))
        if self._cost is None:
            self._cost = reader.cost(worker.flops, own)

    def result(self) -> SampleResult:
        """Means over the questions, their answers line by line, and the cost of the first."""
        assert self._cost is not None
        names = dict.fromkeys(name for score in self.scores for name in score.parts)
        return SampleResult(
            self._job.cell,
            self._sample.number,
            fmean(score.value for score in self.scores),
            {
                name: fmean(score.parts[name] for score in self.scores if name in score.parts)
                for name in names
            },
            "\n".join(score.answer for score in self.scores if score.answer),
            self._cost,
        )


def texts_of(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The texts of tokens.

    Joined they are the whole text, if the tokenizer is fast and finds the same tokens in that text.
    """
    text = tokenizer.decode(ids)
    if getattr(tokenizer, "is_fast", False):
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if list(again["input_ids"]) == list(ids):
            return pieces(text, again["offset_mapping"])
    return tuple(tokenizer.decode([i]) for i in ids)


def failed(cell: Cell, error: BaseException) -> Failure:
    """The failure that is written for an error: its class, its message, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({without_places(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return Failure(cell, without_places(f"{type(error).__name__}: {error}") + where)
