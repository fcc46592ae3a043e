"""The plan: every choice, checked before any work, and the cells that follow from the choices."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from ...cache.composed import ComposedCache
from ...errors import KVPruneError
from ...models.fingerprint import weights_digest
from ...models.structure import base_of, unwrapped
from ...policy.base import TokenPolicy
from ...policy.composition import leaves, nested
from ...statistics import Gate
from ...storage.quantized import Quantized
from ..ledger.identity import code_digest
from ..ledger.results import Cell
from ..measure.reading import longest_of
from ..specs import DENSE, cache_of, canonical, store_of
from ..tasks.base import Sample, Task
from ..tasks.unknown import QuestionUnknown
from .worker import LINES

QUESTIONS = ("known", "unknown", "both")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


Drawn = Mapping[tuple[str, int], tuple[Sample, ...]]
"""The samples by task and context."""


@dataclass(frozen=True)
class Line:
    """One policy at one budget in one store; for the fields see `Cell` in `ledger/results.py`."""

    policy: str
    label: str
    budget: float | None
    policies: Sequence[TokenPolicy] = field(repr=False)
    store: Quantized | None = None


@dataclass(frozen=True)
class Plan:
    """The choices of a comparison, checked as far as that needs no model.

    Attributes:
        policies: specs, or pipelines as for `ComposedCache`.
        tasks: names, paths of JSON lines, or `Task` objects.
        contexts: the context lengths: the most tokens of a prompt.
        budgets: shares of the prompt, for each policy that has a budget; empty for the policies'
            own budgets.
        samples: the number of samples of each cell.
        seed: the seed of the samples.
        question: "known" before the context is compressed, "unknown" (see `tasks/unknown.py`), or
            "both".
        stores: names as "quantized(bits=4)" and "plain", or stores and None, each for all policies;
            empty for the stores of the specs.
        questions: the most questions about one context; the mean of their scores is its score.
        lines: dense, no context, and then each policy at each budget in each store.
        found: the tasks as objects.

    Raises:
        KVPruneError: a choice that is not possible, or no context or no task.
    """

    policies: Sequence[str | Sequence[TokenPolicy] | TokenPolicy]
    tasks: Sequence[str | os.PathLike[str] | Task]
    contexts: Sequence[int]
    budgets: Sequence[float]
    samples: int
    seed: int
    question: str = "known"
    stores: Sequence[str | Quantized | None] = ()
    questions: int = 1
    lines: tuple[Line, ...] = field(init=False, repr=False)
    found: tuple[Task, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        contexts = _listed("contexts", "numbers of tokens, as [1024]", self.contexts)
        _check_counts("--context", contexts)
        object.__setattr__(self, "contexts", tuple(dict.fromkeys(contexts)))
        _check_counts("--samples", [self.samples])
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise KVPruneError(f"--seed {self.seed!r}: expected an int of at least 0")
        budgets = _listed("budgets", "shares of the prompt, as [0.5, 0.25]", self.budgets)
        _check_budgets(budgets)
        policies = _listed("policies", "specs or policies, as ['h2o']", self.policies)
        stores = _listed("stores", "stores, as ['plain', 'quantized(bits=4)']", self.stores)
        object.__setattr__(self, "lines", tuple(_lines(policies, budgets, stores)))
        self._check_fixed_budgets()
        if self.question not in QUESTIONS:
            raise KVPruneError(
                f"--question {self.question!r}: expected one of {', '.join(QUESTIONS)}"
            )
        _check_counts("--questions", [self.questions])
        named = tuple(_tasks(self.tasks))
        if self.questions > 1:
            named = tuple(task.with_questions(self.questions) for task in named)
        unknown = tuple(map(QuestionUnknown, named)) if self.question != "known" else ()
        found = unknown if self.question == "unknown" else named + unknown
        object.__setattr__(self, "found", found)

    def _check_fixed_budgets(self) -> None:
        """Refuses budgets that no prompt reaches, because dense would be compared with dense."""
        least = min(self.contexts)
        for line in self.lines:
            for policy in leaves(line.policies):
                if policy.fixed_budget > least:
                    raise KVPruneError(
                        f"policy {line.label!r}: a budget of {policy.fixed_budget} tokens is "
                        f"beyond the context of {least}, so nothing would be dropped: expected "
                        f"at most as many. Lower it, or give shares with --budgets"
                    )

    def check_model(self, model: Any) -> dict[str, tuple[str, str]]:
        """Refuses choices that are not possible with this attached model.

        Returns:
            for each policy two texts: digests of its learned modules on this model, and digests of
            the files that define it if it is not kvprune's. A text is "" if there are none.

        Raises:
            KVPruneError: a context longer than the model's, or a policy that cannot work on the
                model.
        """
        base: Any = base_of(unwrapped(model))
        longest = longest_of(model)
        for context in self.contexts:
            if longest and context > longest:
                raise KVPruneError(
                    f"--context {context}: expected at most the {longest} tokens that the model "
                    f"was made for"
                )
        return {line.policy: _digests(line, base) for line in self.lines}

    def check_room(self, model: Any, tokenizer: Any, drawn: Drawn) -> None:
        """Refuses samples that end beyond the tokens that the model was made for.

        Raises:
            KVPruneError: a prompt, and the tokens that may follow it, are longer.
        """
        longest, tasks = longest_of(model), {t.name: t for t in self.found}
        for (name, context), samples in drawn.items():
            for sample in chain(*(sample.questions for sample in samples)):
                following = tasks[name].following(sample, tokenizer)
                if longest and len(sample.prompt) + following > longest:
                    raise KVPruneError(
                        f"{name} at --context {context}: a prompt of {len(sample.prompt)} tokens, "
                        f"and {following} that may follow it: expected at most the {longest} "
                        f"together that the model was made for. Ask for a shorter context, or for "
                        f"a shorter answer"
                    )

    def drawn(self, tokenizer: Any) -> Drawn:
        """Draws the samples.

        Returns:
            the samples by task and context.

        Raises:
            KVPruneError: a context too short for a task, or fewer samples than asked for.
        """
        return {
            (task.name, context): _drawn(task, tokenizer, context, self.samples, self.seed)
            for task in self.found
            for context in self.contexts
        }

    def cells(self) -> Iterator[tuple[Cell, Task]]:
        """The cells with their tasks: task by task, context by context, the two lines first."""
        for task in self.found:
            for context in self.contexts:
                for line in self.lines:
                    yield Cell(line.policy, line.label, line.budget, task.name, context), task


def digest_of(sample: Sample, unit: str) -> str:
    """A digest of a sample's texts and of its score's unit, to tell it from other samples."""
    asked = repr((unit, tuple(sample.prompt), tuple(sample.bare), tuple(sample.answers)))
    asked += "".join(digest_of(question, unit) for question in sample.more)
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _listed(name: str, of: str, given: Any) -> list[Any]:
    """All items of a list that the user gave.

    Args:
        name: the argument, as an error names it.
        of: the items that the list should have, as an error names them.
        given: the argument's value.

    Raises:
        KVPruneError: a single text, or a value that is not a list.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise KVPruneError(f"{name}: expected a list of {of}, got {given!r}")
    return list(given)


def _check_counts(name: str, counts: Any) -> None:
    if not counts or any(type(n) is not int or n < 1 for n in counts):
        said = " ".join(map(str, counts))
        raise KVPruneError(f"{name} {said}: expected numbers of at least 1 (ints)")


def _check_budgets(budgets: Any) -> None:
    for budget in budgets:
        if not isinstance(budget, float) or not 0.0 < budget <= 1.0:
            raise KVPruneError(
                f"--budgets {budget!r}: expected shares of the prompt, as 0.25: above 0.0 and up "
                f"to 1.0. Tokens go into the policy, as h2o(heavy=128,recent=128)"
            )


def _lines(given: Sequence[Any], budgets: Sequence[float], stores: Sequence[Any]) -> list[Line]:
    """The two lines, then each policy at each budget in each store; equal ones only once."""
    lines = [Line(name, name, None, ()) for name in LINES]
    found = {(line.policy, line.budget): (line, line.policy) for line in lines}
    in_stores = [line for one in given for line in _in_stores(_pipeline(one), stores)]
    for pipeline in in_stores:
        own = canonical(pipeline.policies, pipeline.store)
        for line in _at_budgets(pipeline, budgets):
            label = pipeline.label
            first, others = found.setdefault((line.policy, line.budget), (line, own))
            # Two different policies became the same when the budget replaced their own budgets.
            if others != own:
                raise KVPruneError(
                    f"policies {first.label!r} and {label!r} are the same at a budget of "
                    f"{line.budget}, which takes the place of their own: expected policies that "
                    f"differ in more. Leave one of them out, or --budgets"
                )
    return [line for line, _ in found.values()]


def _in_stores(line: Line, stores: Sequence[Any]) -> Iterator[Line]:
    """The line in each store; in its own if none is given.

    Raises:
        KVPruneError: no such store, or a line that has a store of its own.
    """
    if not stores:
        yield line
        return
    if line.store is not None:
        raise KVPruneError(
            f"policy {line.label!r}: expected policies alone where --stores names stores, got "
            f"the store {line.store!r}. Leave one of the two out"
        )
    for given in stores:
        store = store_of(given) if isinstance(given, str) else given
        # A cache refuses what is no store.
        ComposedCache(store=store)
        said = given if isinstance(given, str) else repr(store)
        label = line.label if store is None else f"{line.label} in {' '.join(said.split())}"
        yield replace(line, label=label, store=store)


def _pipeline(given: Any) -> Line:
    """The line of what was given, with its own budget."""
    if isinstance(given, str):
        cache = cache_of(given)
        label = " ".join(given.split())
        return Line(
            canonical(cache.policies, cache.store), label, None, cache.policies, cache.store
        )
    pipeline = [given] if isinstance(given, TokenPolicy) else given
    if not isinstance(pipeline, (list, tuple)):
        raise KVPruneError(
            f"policies: expected specs as 'h2o(heavy=256)', policies as H2O(), or lists of these, "
            f"got {given!r}"
        )
    policies = ComposedCache(pipeline).policies
    label = canonical(policies)
    return Line(label, label, None, policies)


def _at_budgets(line: Line, budgets: Sequence[float]) -> Iterator[Line]:
    """The line at each budget; as it is if its policies have no budget or none is given."""
    if not line.policies and line.store is None:
        yield Line(DENSE, DENSE, None, ())
        return
    shared = {budget: _with_budget(line.policies, budget) for budget in budgets}
    if not budgets or shared[budgets[0]] is None:
        yield replace(line, policy=canonical(line.policies, line.store))
        return
    for budget, smaller in shared.items():
        assert smaller is not None
        text = canonical(smaller, line.store)
        yield replace(line, policy=text, budget=budget, policies=smaller)


def _with_budget(policies: Sequence[TokenPolicy], budget: float) -> list[TokenPolicy] | None:
    """The pipeline with this budget in each policy that has one; None if no policy has one."""
    found = [policy.with_budget(budget) for policy in policies]
    if all(policy is None for policy in found):
        return None
    return [new or old for new, old in zip(found, policies, strict=True)]


def _tasks(given: Any) -> Iterator[Task]:
    names = set[str]()
    found = _listed("tasks", "at least one task, as ['needle']", given)
    if not found:
        raise KVPruneError("tasks: expected a list of at least one task, as ['needle'], got none")
    for one in found:
        task = one if isinstance(one, Task) else _named(one)
        if task.name in names:
            raise KVPruneError(f"--tasks: {task.name} comes twice: expected each task once")
        names.add(task.name)
        yield task


def _named(name: Any) -> Task:
    from ..tasks import task

    if not isinstance(name, (str, os.PathLike)):
        raise KVPruneError(
            f"tasks: expected names, paths of JSON lines or tasks, as Needle(), got {name!r}"
        )
    return task(os.fspath(name))


def _drawn(task: Task, tokenizer: Any, context: int, count: int, seed: int) -> tuple[Sample, ...]:
    samples = tuple(task.samples(tokenizer, context, count, seed))
    if [s.number for s in samples] != list(range(count)):
        raise KVPruneError(
            f"{task.name}: expected {count} samples, numbered from 0, got "
            f"{[s.number for s in samples]}"
        )
    for sample in chain(*(sample.questions for sample in samples)):
        if not (0 < len(sample.prompt) <= context and 0 < len(sample.bare) <= context):
            raise KVPruneError(
                f"{task.name}: sample {sample.number} has {len(sample.prompt)} tokens, and "
                f"{len(sample.bare)} without its context: expected 1 to {context} each"
            )
    return samples


def _digests(line: Line, base: Any) -> tuple[str, str]:
    """Digests of the learned modules of a line's policies on a model, and of the policies' code."""
    cache = ComposedCache(line.policies, store=line.store)
    # Binding refuses whatever else is not possible with the model.
    cache.bind(base._kvprune, base)
    working = list(nested(p.for_model(base) for p in line.policies))
    modules = [m for p in working for m in vars(p).values() if isinstance(m, nn.Module)]
    modules += [s.module for p in working for s in p.statistics if isinstance(s, Gate)]
    weights = " ".join(weights_digest(m)[:16] for m in modules)
    return weights, code_digest(nested(line.policies))


def check_device(dtype: str, device: str) -> None:
    """Refuses a dtype or a device that torch does not have on this machine.

    Raises:
        KVPruneError: there is no such dtype or device.
    """
    if dtype not in DTYPES:
        raise KVPruneError(f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    try:
        torch.zeros((), device=device)
    # The device has an unknown name, or is not in this machine. Each backend has an error class of
    # its own.
    except Exception as error:
        raise KVPruneError(
            f"--device {device!r}: expected a device that torch has here, as cpu: {error}"
        ) from error
