"""The executor "shared": cells that differ only in what they evict share readings of prompts.

Evicting at a prompt's end does not change how the prompt was read. So cells of one task and
context, whose policies prune the same and observe the same, read each prompt once together. Then
each cell evicts for itself (`ComposedCache.with_policies`) and reads the last token. Its scores are
those of the cell run alone, to the bit. The time of a shared reading belongs to no cell. So the
first `TIMED` samples of a cell are read alone, and its `prefill_seconds` are the seconds of these
samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...cache.composed import ComposedCache
from ...errors import from_ctrl_c
from ...policy.base import TokenPolicy
from ...policy.composition import leaves, wanted_at
from ...statistics import Statistic
from ..ledger.ledger import Outcome
from ..ledger.results import Cell, Failure
from ..measure.flops import counting, layers_of, own_flops
from ..measure.reader import Reading
from ..specs import DENSE, cache_of, canonical
from ..tasks.base import Sample
from .executors import Source, attempted
from .worker import LINES, NO_CONTEXT, Asked, Job, Worker, failed

TIMED = 1
"""The samples of each cell that are read alone, for their time and for the cell's trace."""


@dataclass
class Group:
    """Jobs that read the same prompts in the same way.

    Attributes:
        pruners: the policies that prune, which all jobs have in common.
        observe: the statistics that all jobs want, at every layer.
        pipelines: the jobs, each with its policies.
        failed: the cells of jobs that were given up.
    """

    pruners: list[TokenPolicy]
    observe: tuple[Statistic, ...]
    pipelines: list[tuple[Job, list[TokenPolicy]]] = field(default_factory=list)
    failed: set[Cell] = field(default_factory=set)

    def samples(self) -> list[Sample]:
        """All samples that some job has still to run, in their order."""
        found = {sample.number: sample for job, _ in self.pipelines for sample in job.samples}
        return [found[number] for number in sorted(found)]

    def wanting(self, sample: Sample) -> Iterator[tuple[Job, list[TokenPolicy]]]:
        """The jobs that have this sample still to run, with their policies."""
        for job, policies in self.pipelines:
            if job.cell not in self.failed and any(s.number == sample.number for s in job.samples):
                yield job, policies


def shared(jobs: Sequence[Job], worker: Worker, source: Source) -> Iterator[Outcome]:
    """The executor: runs each job's first samples alone, then all other samples together."""
    gone = set[Cell]()
    for job in jobs:
        alone = tuple(s for s in job.samples if s.number < TIMED)
        for outcome in attempted(replace(job, samples=alone), worker) if alone else ():
            gone |= {job.cell} if isinstance(outcome, Failure) else set()
            yield outcome
    left = [replace(j, samples=tuple(s for s in j.samples if s.number >= TIMED)) for j in jobs]
    left = [job for job in left if job.samples and job.cell not in gone]
    groups, others = grouped(left, len(layers_of(worker.model)), worker.tokenizer)
    for group in groups:
        for sample in group.samples():
            yield from _together(group, sample, worker)
    for job in others:
        yield from attempted(job, worker)


def grouped(jobs: Sequence[Job], layers: int, tokenizer: Any) -> tuple[list[Group], list[Job]]:
    """Sorts jobs into groups that share what they read, and jobs that cannot.

    A job cannot share its reading in six cases. It reads another prompt (the line "no context").
    Its cache has a store. Its reading depends on what is evicted: with positions inside the cache,
    or with one policy that has both hooks. Attention is observed in some layers only, which changes
    the last bits of attention itself. Or a policy wants a statistic per layer, such as the newest
    queries, or a second reading.

    Args:
        jobs: the jobs to sort.
        layers: the number of the model's decoder layers.
        tokenizer: the model's.

    Returns:
        groups of at least one job, and the jobs that cannot share.
    """
    groups, others = dict[tuple[str, int, str, tuple[Statistic, ...]], Group](), list[Job]()
    for job in jobs:
        cache = cache_of(DENSE if job.cell.policy in LINES else job.cell.policy)
        policies = [policy.for_tokenizer(tokenizer) for policy in cache.policies]
        wanted = {wanted_at(policies, layer) for layer in range(layers)}
        # What is known of a layer's queries is gone once the prompt was read.
        passing = any(statistic.per == "layer" for each in wanted for statistic in each)
        alone = job.cell.policy == NO_CONTEXT or cache.store is not None
        alone = alone or not _separable(policies) or any(policy.reads_again for policy in policies)
        if alone or passing or len(wanted) > 1:
            others.append(job)
            continue
        (names,) = wanted
        pruners = [p for p in policies if "rank_hidden" in p.hooks]
        key = (job.cell.task, job.cell.context, canonical(pruners), names)
        group = groups.setdefault(key, Group(pruners, names))
        # All jobs use the very same objects: these are equal even if their class compares in its
        # own way.
        same = iter(group.pruners)
        pipeline = [next(same) if "rank_hidden" in p.hooks else p for p in policies]
        group.pipelines.append((job, pipeline))
    return list(groups.values()), others


def _separable(policies: Sequence[TokenPolicy]) -> bool:
    """Whether no policy both prunes and evicts, and none assigns positions inside the cache."""
    inside = any(p.positions_in_cache for p in leaves(policies))
    return not inside and all(len(p.hooks) <= 1 for p in policies)


def _together(group: Group, sample: Sample, worker: Worker) -> Iterator[Outcome]:
    """The outcomes of one sample in all jobs that want it.

    An error in the shared reading ends all of these jobs; a later error ends its own job alone.
    """
    wanting = list(group.wanting(sample))
    if not wanting:
        return
    asked, last = {job.cell: Asked(job, sample) for job, _ in wanting}, sample.questions[-1]
    lead: Reading | None = None
    for question in sample.questions:
        try:
            if lead is None or not lead.serves(question.prompt, question.behind):
                # The reading before goes first, so that two are never held at once.
                lead = None
                lead = _lead(group, question, worker)
            lead = lead.of_other(question.prompt, question.behind)
        # As in `attempted`, a policy or a task may raise any error.
        except Exception as error:
            if from_ctrl_c(error):
                raise KeyboardInterrupt from error
            for job, _ in wanting:
                if job.cell not in group.failed:
                    yield _given_up(group, job, error)
            return
        for job, policies in wanting:
            if job.cell in group.failed:
                continue
            try:
                _ask(lead, asked[job.cell], question, policies, worker)
                if question is last:
                    yield asked[job.cell].result()
            except Exception as error:
                if from_ctrl_c(error):
                    raise KeyboardInterrupt from error
                yield _given_up(group, job, error)


def _given_up(group: Group, job: Job, error: Exception) -> Failure:
    """Marks a job as failed, and returns its failure."""
    group.failed.add(job.cell)
    return failed(job.cell, error)


def _lead(group: Group, sample: Sample, worker: Worker) -> Reading:
    """The shared reading of a prompt, with the FLOPs that the pruning policies compute in it."""
    cache = ComposedCache(group.pruners, group.observe)
    with own_flops() as counted:
        lead = Reading.of(worker.model, sample.prompt, cache, sample.behind)
    return replace(lead, seconds=None, own=sum(counted))


def _ask(
    lead: Reading, asked: Asked, question: Sample, policies: list[TokenPolicy], worker: Worker
) -> None:
    """Asks one job's question, with the shared reading and the job's own policies."""
    with counting() as evicting:
        cache = lead.cache.with_policies(policies, worker.model)
    with own_flops() as counted:
        reader = worker.reader(replace(lead, cache=cache))
    own = lead.own + evicting.get_total_flops() + sum(counted)
    asked.ask(worker, question, reader, own)
