"""`check`: tries every invariant on one policy, with models, prompts and forwards from a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import KVPruneError
from ..policy.base import TokenPolicy
from ..policy.checks import checked
from . import invariants
from .runs import STORES, Case, feed

FAMILIES = ("llama", "qwen3", "mistral-window", "gpt_neox")

Invariant = Callable[..., None]

# For each invariant: its title, which begins with its number, and the families it is tried on.
INVARIANTS: dict[Invariant, tuple[str, Sequence[str]]] = {
    invariants.equals_dense_until_something_goes: ("1, dense below the budget", FAMILIES),
    invariants.keeps_what_it_saw: ("2, kept columns", FAMILIES),
    invariants.holds_no_more_than_its_budget: ("3, budgets", FAMILIES),
    invariants.rows_are_independent: ("4, independent rows", FAMILIES),
    invariants.values_belong_to_their_columns: ("5, alignment", ("llama", "qwen3")),
    invariants.moved_rows_go_on: ("5, rows that move", FAMILIES),
    invariants.copies_and_files_go_on: ("5, copies and files", ("llama", "qwen3")),
    invariants.crop_takes_back_or_refuses: ("5, crop", ("llama", "qwen3")),
    invariants.drafts_leave_no_trace: ("5, drafts", ("llama", "qwen3")),
    invariants.reset_is_as_new: ("5, reset", FAMILIES),
    invariants.pipeline_is_by_hand: ("6, pipelines", ("llama", "qwen3")),
    invariants.united_with_itself: ("6, a | a", ("llama", "qwen3")),
    invariants.caches_share_a_policy: ("6, no state", ("llama", "qwen3")),
    invariants.lengths_are_logical: ("7, lengths", ("llama", "qwen3")),
    invariants.bytes_are_of_kept_slots: ("8, bytes", ("llama", "gpt_neox")),
    invariants.error_needs_a_reset: ("11, errors", ("llama",)),
    invariants.promises_are_kept: ("12, promises", ("llama", "qwen3")),
    invariants.views_are_only_read: ("views are read", ("llama",)),
    invariants.slots_have_no_order: ("slots have no order", ("llama",)),
    invariants.layers_restrict: ("layers=", ("llama", "qwen3")),
}


def check(
    policy: TokenPolicy | Sequence[TokenPolicy],
    *,
    roomy: TokenPolicy | Sequence[TokenPolicy] | None = None,
    bound: int | None = None,
    examples: int = 3,
    seed: int = 0,
) -> None:
    """Tries every invariant of kvprune on a policy, for tests in any package.

    The models are tiny, random and in float64: 4 layers, hidden size 32, 4 query heads over 2
    key/value heads (GPT-NeoX: 4); Llama, Qwen3, Mistral with a sliding window of 12, GPT-NeoX.
    They read two rows of up to 24 tokens, padded on the left, in one or several forwards, then
    single tokens and a short second turn. So give the policy a budget of some 4 to 12 tokens, so
    that there is something to evict. An example takes some seconds.

    Args:
        policy: the policy, or a pipeline of several.
        roomy: the same policy with a budget that 40 tokens do not reach: it must then be dense.
            None to try that only as far as `policy` keeps everything.
        bound: the most slots that a layer may hold after a forward; None for the budget that the
            policy itself answers.
        examples: how many random inputs each invariant is tried on.
        seed: the seed of these inputs.

    Raises:
        AssertionError: an invariant does not hold; the message says which invariant, on what
            input, what was expected and what was got.
        KVPruneError: not a policy, or a policy whose answers no cache would take.
    """
    pipeline = _pipeline(policy)
    # First a plain run, so that a policy which a cache refuses raises the error that a user reads.
    (case,) = _cases(FAMILIES[:1], 1, f"{seed} plain")
    try:
        feed(case.run(pipeline), case.ids, case.mask, case.steps)
    except KVPruneError:
        raise
    except Exception:
        # The policy's own error: the invariants below say on what input it is raised.
        pass
    for invariant, (title, families) in INVARIANTS.items():
        for case in _cases(families, examples, f"{seed} {title}"):
            more = {"bound": bound} if invariant is invariants.holds_no_more_than_its_budget else {}
            _try(invariant, title, pipeline, case, more)
    if roomy is None:
        return
    for case in _cases(FAMILIES, examples, f"{seed} roomy"):
        # The prompt in one forward; `generate` adds the tokens behind it.
        case = replace(case, steps=(sum(case.steps[:-4]),))
        _try(invariants.equals_dense, "1, a roomy budget is dense", _pipeline(roomy), case, {})


def _pipeline(policy: TokenPolicy | Sequence[TokenPolicy]) -> tuple[TokenPolicy, ...]:
    return checked([policy] if isinstance(policy, TokenPolicy) else policy)


def _cases(families: Sequence[str], examples: int, seed: str) -> list[Case]:
    """Cases: a prompt in one to three forwards, single tokens, a second turn and single tokens."""
    draw, stores, cases = random.Random(seed), random.Random(f"{seed} stores"), list[Case]()
    for number in range(examples):
        length = draw.randint(2, 24)
        cuts = sorted(draw.sample(range(1, length), min(draw.randint(0, 2), length - 1)))
        edges = [0, *cuts, length]
        steps = [b - a for a, b in itertools.pairwise(edges)]
        padding = (
            draw.randint(0, steps[0] - 1) * draw.randint(0, 1),
            draw.randint(0, steps[0] - 1),
        )
        steps += [1, 1, draw.randint(2, 7), 1, 1]
        family = families[number % len(families)]
        token_seed, store = draw.randint(0, 2**16), stores.choice(STORES)
        parting = bool(stores.randint(0, 1))
        cases.append(Case(tuple(steps), padding, family, token_seed, store=store, parting=parting))
    return cases


def _try(
    invariant: Invariant, title: str, pipeline: Sequence[TokenPolicy], case: Case, more: Any
) -> None:
    try:
        with torch.no_grad():
            invariant(pipeline, case, **more)
    # A policy's own errors as well: the message says on what input they were raised.
    except Exception as error:
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        raise AssertionError(
            f"invariant {title} ({invariant.__name__}) does not hold for {list(pipeline)!r} on "
            f"{case}: {kind}{error}"
        ) from error
