"""The comparison: each policy at each budget on each task and context, every cell run once.

Finished samples are in `results.jsonl` (see `ledger/ledger.py`). An executor (see `executors.py`)
runs the samples that are missing, cell by cell. Everything that can be wrong is checked before the
first cell.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...errors import KVPruneError
from ...models.devices import device_of
from ...models.structure import base_of, unwrapped
from ...policy.base import TokenPolicy
from ...storage.quantized import Quantized
from ...wiring.attach import attach, detach
from ..command import command_line
from ..data.loading import loaded
from ..ledger.ledger import FORMAT, Key, Ledger, Outcome, key_of, opened
from ..ledger.results import Cell, Failure, Results
from ..report.rows import rows_of
from ..tasks.base import Sample, Task
from .executors import Executor, Source, in_process
from .plan import Drawn, Plan, check_device, digest_of
from .progress import Watch, stage
from .worker import Job, Worker

EXECUTORS = ("local", "shared", "ray")
"""The executors that may run the cells.

"local": this process, one cell after the other.
"shared": this process, several cells on one reading of each prompt.
"ray": a Ray cluster.
"""
PACKAGES = ("kvprune", "torch", "transformers", "tokenizers", "numpy")
"""The packages whose versions may change a result."""
ROOM = 16 * 2**20
LINE = 8 * 2**10
"""Bytes that must be free on the disk: ROOM for the report and the traces, LINE for each sample."""


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison.

    Attributes:
        results: all samples, failures and traces.
        folder: the folder that keeps the results; None if no folder does.
        asked: the cells that this call had to run.
    """

    results: Results = field(repr=False)
    folder: Path | None = None
    asked: frozenset[Key] = field(default=frozenset(), repr=False)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One flat dict for each cell, failed ones included; see `rows_of` in `report/rows.py`.

        `pandas.DataFrame(comparison.rows)` makes a data frame of them.
        """
        return rows_of(self.results)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The cells that this call could not run, each with its error."""
        return tuple(f for f in self.results.failures if key_of(f.cell) in self.asked)


def compare(
    model: Any,
    policies: Sequence[str | Sequence[TokenPolicy] | TokenPolicy],
    *,
    tasks: Sequence[str | os.PathLike[str] | Task] = ("needle", "squad"),
    contexts: Sequence[int] = (1024,),
    budgets: Sequence[float] = (),
    samples: int = 20,
    seed: int = 0,
    question: str = "known",
    stores: Sequence[str | Quantized | None] = (),
    questions: int = 1,
    dtype: str = "auto",
    device: str | None = None,
    out: str | Path | None = None,
    executor: str = "local",
    tokenizer: Any = None,
    progress: bool = False,
) -> Comparison:
    """Runs every policy at every budget on every task at every context length.

    The lines "dense" (nothing is dropped) and "no context" (the model can only guess) are always
    run. Stopped and called again with the same `out`, the comparison goes on where it was; the new
    call may ask for more of everything but questions. A cell that fails is in `failures`, does not
    stop the other cells, and is run again by the next call that asks for it.

    Args:
        model: the model's name or folder, or a loaded model (attached or not; not with
            `executor="ray"`).
        policies: specs (see `specs.py`), policies, or pipelines as for `ComposedCache`.
        tasks: names, paths of JSON lines, or `Task` objects.
        contexts: the context lengths: the most tokens of a prompt.
        budgets: shares of the prompt that replace the budgets of policies that have one (see
            `TokenPolicy.with_budget`); empty for the policies' own budgets.
        samples: the number of samples of each cell.
        seed: the seed of the samples.
        question: "known" if policies act once the whole prompt was read; "unknown" if the context
            is compressed before its question is read, as where a prefix is used for many
            questions; "both" for both, as tasks of their own.
        stores: how keys and values are held: "plain" or None for as the model made them, and
            stores, as "quantized(bits=4)" or `Quantized(bits=4)`; each policy is run in each. Empty
            for the stores that the specs name.
        questions: the most questions about one context; the mean of their scores is the sample's.
            With unknown questions all are asked of one compressed cache.
        dtype: the dtype to load the model in; "auto" for the dtype of its file.
        device: the device to run on, such as "cuda"; None for the CPU, or for the device of a
            loaded model.
        out: the folder for `results.jsonl` and the report; None keeps no files.
        executor: "local" for this process. "shared" for this process too, with each prompt read
            once for all cells that differ only in what they evict (see `sharing.py`): the same
            scores, sooner, but prefill seconds of one sample alone. "ray" for a cluster.
        tokenizer: the tokenizer of a loaded model; None for the one at the model's `name_or_path`.
            A model given by name brings its own.
        progress: whether to draw a bar on stderr, with the time left.

    Raises:
        KVPruneError: a choice that is not possible, before any cell is run; or no room on the disk,
            while all finished samples are kept.
    """
    plan = Plan(policies, tasks, contexts, budgets, samples, seed, question, stores, questions)
    run = Run(model, tokenizer, dtype, device, executor)
    keep = Path(out) if out is not None else None
    found = measured(plan, run, keep, progress)
    if keep is not None:
        from ..report import write_report

        with stage("writing the report", progress):
            write_report(found.results, keep)
    return found


@dataclass(frozen=True)
class Run:
    """The model that a plan is run on, and the way to run it; see the arguments of `compare`."""

    model: Any
    tokenizer: Any = None
    dtype: str = "auto"
    device: str | None = None
    executor: str = "local"

    @property
    def source(self) -> Source:
        """The arguments with which other processes load the model."""
        return Source(str(self.model), self.dtype, "cpu" if self.device is None else self.device)


def measured(plan: Plan, run: Run, keep: Path | None = None, progress: bool = False) -> Comparison:
    """Does what `compare` does, without the report.

    Args:
        plan: the choices to compare.
        run: the model, and the way to run it.
        keep: the folder for the results file; None keeps no file.
        progress: see `compare`.

    Raises:
        KVPruneError: see `compare`.
    """
    execute = executor_of(run.executor, loaded=not isinstance(run.model, (str, Path)))
    check_device(run.dtype, run.source.device)
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if keep is not None:
            from ..report import check_folder

            check_folder(keep)
        ledger = stack.enter_context(opened(folder))
        worker = stack.enter_context(_worker(run))
        with stage("reading the model's weights, to tell them from others", progress):
            about = _about(run.model, worker, plan.seed)
        with stage("drawing the samples", progress):
            jobs = _prepared(plan, ledger, worker, about)
        watch = stack.enter_context(Watch.shown(jobs, progress))
        _run(ledger, execute(jobs, worker, run.source), jobs, watch)
        return Comparison(ledger.results, keep, frozenset(key_of(job.cell) for job in jobs))


@contextmanager
def _worker(run: Run) -> Iterator[Worker]:
    """A worker with the model; a loaded model is afterwards as it was before."""
    model, tokenizer = run.model, run.tokenizer
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise KVPruneError(
                f"tokenizer: expected none with the model {str(model)!r}, which brings its own. "
                f"Leave it out, or load the model and give both"
            )
        tokenizer, model = loaded(run.source.model, run.dtype, run.source.device)
        yield Worker(attach(model), tokenizer)
        return
    if not hasattr(model, "config"):
        raise KVPruneError(f"model: expected a name, a folder or a model, got {model!r}")
    if run.dtype != "auto" or run.device not in (None, str(device_of(model))):
        raise KVPruneError(
            f"dtype and device of a loaded model are its own: leave them out, got {run.dtype!r} "
            f"and {run.device!r}"
        )
    if model.training:
        raise KVPruneError("model: expected one that is not in training: call model.eval() first")
    tokenizer = _own_tokenizer(model) if tokenizer is None else tokenizer
    if not callable(getattr(tokenizer, "decode", None)):
        raise KVPruneError(f"tokenizer: expected that of the model, loaded, got {tokenizer!r}")
    was_attached = "_kvprune" in base_of(unwrapped(model)).__dict__
    try:
        yield Worker(model if was_attached else attach(model), tokenizer)
    finally:
        if not was_attached:
            detach(model)


def _own_tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    name = getattr(model.config, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name)
    # As in `data/loading.py`, each library has an error class of its own.
    except Exception as error:
        raise KVPruneError(
            f"expected the tokenizer of the model at its name_or_path, which is {name!r}, and "
            f"found none: give tokenizer= as well ({error})"
        ) from error


def _about(model: Any, worker: Worker, seed: int) -> dict[str, Any]:
    """The settings, versions and machine that a results file names in its first line."""
    on = device_of(worker.model)
    name = str(model) if isinstance(model, (str, Path)) else worker.model.config.name_or_path
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if on.type == "cuda":
        machine += f", {torch.cuda.get_device_name(on)}"
    return {
        "format": FORMAT,
        # A path such as "." has a name only once it is absolute.
        "model": Path(os.path.abspath(name)).name,
        "digest": worker.digest,
        "seed": seed,
        "dtype": str(worker.model.dtype).removeprefix("torch."),
        "device": on.type,
        "versions": {package: _version(package) for package in PACKAGES},
        "machine": machine,
        "date": datetime.datetime.now().isoformat(" ", "minutes"),
        "command": command_line([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _prepared(plan: Plan, ledger: Ledger, worker: Worker, about: dict[str, Any]) -> list[Job]:
    """The jobs that are still to be run; everything is checked before the file is written to."""
    ledger.check(about)
    digests = plan.check_model(worker.model)
    for policy, (modules, code) in digests.items():
        ledger.check_policy(policy, modules, code)
    for task in plan.found:
        ledger.check_task(task.name, task.unit, task.floor)
    drawn = plan.drawn(worker.tokenizer)
    plan.check_room(worker.model, worker.tokenizer, drawn)
    units = {task.name: task.unit for task in plan.found}
    for (name, context), samples in drawn.items():
        for sample in samples:
            ledger.check_item(name, context, sample.number, digest_of(sample, units[name]))
    jobs = [Job(c, task, _missing(ledger, c, drawn)) for c, task in plan.cells()]
    jobs = [job for job in jobs if job.samples]
    _check_room(ledger.path.parent, jobs)
    ledger.begin(about)
    for task in plan.found:
        ledger.note_task(task.name, task.unit, task.floor)
    for policy, (modules, code) in digests.items():
        ledger.note_policy(policy, modules, code)
    return jobs


def _missing(ledger: Ledger, cell: Cell, drawn: Drawn) -> tuple[Sample, ...]:
    done = ledger.done(cell)
    return tuple(s for s in drawn[cell.task, cell.context] if s.number not in done)


def _check_room(folder: Path, jobs: Sequence[Job]) -> None:
    needed, free = ROOM + LINE * sum(len(j.samples) for j in jobs), shutil.disk_usage(folder).free
    if jobs and free < needed:
        raise KVPruneError(
            f"{folder}: expected {needed / 2**20:.0f} MiB of room for the results, found "
            f"{free / 2**20:.0f}: make room on the disk, or name another folder with --out"
        )


def _run(ledger: Ledger, outcomes: Iterable[Outcome], jobs: Sequence[Job], watch: Watch) -> None:
    """Writes each outcome to the results file as soon as the executor yields it."""
    items = {(key_of(j.cell), s.number): digest_of(s, j.task.unit) for j in jobs for s in j.samples}
    for outcome in outcomes:
        number = getattr(outcome, "sample", -1)
        # An executor may yield a sample twice; the first result counts.
        if (key_of(outcome.cell), number) in ledger.samples:
            continue
        ledger.add(outcome, items.get((key_of(outcome.cell), number), ""))
        watch.came(outcome)


# Not in `executors.py`: the executors that this function imports import that file.
def executor_of(name: str, loaded: bool) -> Executor:
    """The executor with this name.

    Args:
        name: one of `EXECUTORS`.
        loaded: whether the model is an object in this process, which no other process can load.

    Raises:
        KVPruneError: an unknown executor, a missing package, or a loaded model with an executor
            that needs its name.
    """
    if name not in EXECUTORS:
        raise KVPruneError(f"--executor {name!r}: expected one of {', '.join(EXECUTORS)}")
    if name == "local":
        return in_process
    if name == "shared":
        from .sharing import shared

        return shared
    if loaded:
        raise KVPruneError(
            f"executor={name!r} with a loaded model: expected its name or folder, which every "
            f"worker loads by itself"
        )
    if importlib.util.find_spec("ray") is None:
        raise KVPruneError(
            "--executor ray: expected the package ray; mend it with: pip install kvprune[ray]"
        )
    from .on_ray import on_ray

    return on_ray
