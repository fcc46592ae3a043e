"""What is compared: every choice checked before any work, and the cells that follow from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kvprune.cache import ComposedCache
from kvprune.composition import leaves
from kvprune.errors import KVPruneError
from kvprune.families import base_of, unwrapped
from kvprune.policy import TokenPolicy
from kvprune.saving import describe

from .results import Cell
from .specs import DENSE, canonical, parse
from .tasks.base import Sample, Task
from .worker import LINES

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Line:
    """One policy at one budget; see `results.Cell`."""

    policy: str
    label: str
    budget: float | None
    policies: Sequence[TokenPolicy] = field(repr=False)


@dataclass(frozen=True)
class Plan:
    """What to compare, as far as it can be checked without the model.

    policies: specs, or pipelines as for `ComposedCache`. tasks: names, paths, or tasks.
    contexts: tokens that a prompt has at the most. budgets: shares of the prompt, for each
    policy that has a budget; none for the policies' own. samples: of each cell.

    Raises:
        KVPruneError: a choice that cannot be, or none.
    """

    policies: Sequence[str | Sequence[TokenPolicy] | TokenPolicy]
    tasks: Sequence[str | Task]
    contexts: Sequence[int]
    budgets: Sequence[float]
    samples: int
    seed: int
    lines: tuple[Line, ...] = field(init=False, repr=False)
    found: tuple[Task, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_counts("--context", self.contexts)
        _check_counts("--samples", [self.samples])
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise KVPruneError(f"--seed {self.seed!r}: expected an int of at least 0")
        _check_budgets(self.budgets)
        object.__setattr__(self, "lines", tuple(_lines(self.policies, self.budgets)))
        self._check_fixed_budgets()
        object.__setattr__(self, "found", tuple(_tasks(self.tasks)))

    def _check_fixed_budgets(self) -> None:
        """Refuses budgets that no prompt reaches, as that would compare dense with dense."""
        least = min(self.contexts)
        for line in self.lines:
            for policy in leaves(line.policies):
                if policy.fixed_budget > least:
                    raise KVPruneError(
                        f"policy {line.label!r}: a budget of {policy.fixed_budget} tokens is "
                        f"beyond the context of {least}, so nothing would be dropped: expected "
                        f"at most as many. Lower it, or give shares with --budgets"
                    )

    def check_model(self, model: Any) -> dict[str, str]:
        """Refuses what this attached model cannot do.

        Returns:
            by policy, a digest of the learned modules that it has on this model; "" for none.

        Raises:
            KVPruneError: a context longer than the model's, or a policy that cannot work on it.
        """
        base: Any = base_of(unwrapped(model))
        longest = getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", 0)
        for context in self.contexts:
            if longest and context > longest:
                raise KVPruneError(
                    f"--context {context}: expected at most the {longest} tokens that the model "
                    f"was made for"
                )
        return {line.policy: _modules(line, base) for line in self.lines}

    def drawn(self, tokenizer: Any) -> dict[tuple[str, int], tuple[Sample, ...]]:
        """The samples, by task and context.

        Raises:
            KVPruneError: a context too short for a task, or fewer samples than asked for.
        """
        return {
            (task.name, context): _drawn(task, tokenizer, context, self.samples, self.seed)
            for task in self.found
            for context in self.contexts
        }

    def cells(self) -> Iterator[tuple[Cell, Task]]:
        """Task by task and context by context, the two lines first."""
        for task in self.found:
            for context in self.contexts:
                for line in self.lines:
                    yield Cell(line.policy, line.label, line.budget, task.name, context), task


def digest_of(sample: Sample) -> str:
    """What tells what was asked from what another sample asks."""
    asked = repr((tuple(sample.prompt), tuple(sample.bare), tuple(sample.answers)))
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:16]


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


def _lines(given: Any, budgets: Sequence[float]) -> Iterator[Line]:
    """The two lines, and each policy at each budget, everything once."""
    if isinstance(given, str):
        raise KVPruneError(f"policies: expected a list of specs, as [{given!r}], came a text")
    seen = set[tuple[str, float | None]]()
    found = [Line(name, name, None, ()) for name in LINES]
    found += [line for one in given for line in _at_budgets(one, budgets)]
    for line in found:
        if (line.policy, line.budget) not in seen:
            seen.add((line.policy, line.budget))
            yield line


def _at_budgets(given: Any, budgets: Sequence[float]) -> Iterator[Line]:
    if isinstance(given, str):
        policies, label = parse(given), " ".join(given.split())
    else:
        policies = [given] if isinstance(given, TokenPolicy) else list(given)
        label = canonical(ComposedCache(policies).policies)
    if not policies:
        yield Line(DENSE, DENSE, None, ())
        return
    shared = {budget: _with_budget(policies, budget) for budget in budgets}
    if not budgets or shared[budgets[0]] is None:
        yield Line(canonical(policies), label, None, policies)
        return
    for budget, smaller in shared.items():
        assert smaller is not None
        yield Line(canonical(smaller), label, budget, smaller)


def _with_budget(policies: Sequence[TokenPolicy], budget: float) -> list[TokenPolicy] | None:
    """The pipeline with the budget in each part that has one; None where no part has."""
    found = [policy.with_budget(budget) for policy in policies]
    if all(policy is None for policy in found):
        return None
    return [new or old for new, old in zip(found, policies, strict=True)]


def _tasks(given: Any) -> Iterator[Task]:
    if not given or isinstance(given, str):
        raise KVPruneError(f"tasks: expected a list of at least one task, came {given!r}")
    names = set[str]()
    for one in given:
        task = one if isinstance(one, Task) else _named(one)
        if task.name in names:
            raise KVPruneError(f"--tasks: {task.name} comes twice: expected each task once")
        names.add(task.name)
        yield task


def _named(name: str) -> Task:
    from .tasks import task

    return task(name)


def _drawn(task: Task, tokenizer: Any, context: int, count: int, seed: int) -> tuple[Sample, ...]:
    samples = tuple(task.samples(tokenizer, context, count, seed))
    if [s.number for s in samples] != list(range(count)):
        raise KVPruneError(
            f"{task.name}: expected {count} samples, numbered from 0, came "
            f"{[s.number for s in samples]}"
        )
    for sample in samples:
        if not (0 < len(sample.prompt) <= context and 0 < len(sample.bare) <= context):
            raise KVPruneError(
                f"{task.name}: sample {sample.number} has {len(sample.prompt)} tokens, and "
                f"{len(sample.bare)} without its context: expected 1 to {context} each"
            )
    return samples


def _modules(line: Line, base: Any) -> str:
    """A digest of the learned modules of a line's policies on a model."""
    cache = ComposedCache(line.policies)
    # Whatever else the model cannot do is refused here.
    cache.bind(base._kvprune, base)
    working = [p.for_model(base) for p in leaves(line.policies)]
    modules = [m for p in working for m in vars(p).values() if isinstance(m, nn.Module)]
    return " ".join(describe(m)["digest"][:16] for m in modules)


def check_device(dtype: str, device: str) -> None:
    """Refuses what torch does not have here.

    Raises:
        KVPruneError: no such dtype or device.
    """
    if dtype not in DTYPES:
        raise KVPruneError(f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    try:
        torch.zeros((), device=device)
    # No such name, or none here: each backend has an error class of its own.
    except Exception as error:
        raise KVPruneError(
            f"--device {device!r}: expected a device that torch has here, as cpu: {error}"
        ) from error
