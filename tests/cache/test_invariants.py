"""The invariants of the design, as properties over every listed policy.

A new policy joins by being listed once, in `strategies.POLICIES`.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvprune
from kvprune import KVPruneError
from kvprune.policies import H2O, StreamingLLM
from kvprune.testing import invariants
from kvprune.testing.runs import Case, Run, feed

from ..support.driver import Driver, Tokens
from ..support.models import LAYERS, fresh_model, left_padded, plain_model, prompt, tiny_model
from ..support.strategies import (
    POLICIES,
    SILENT,
    Listed,
    budgets,
    cases,
    evicting,
    evicting_pipelines,
    head_counts,
    listed,
    pipelines,
    sampled,
    sdtp_pruner,
    seeds,
)

FAMILIES = st.sampled_from(["llama", "qwen3", "mistral-window", "gpt_neox"])
LLAMA = st.just("llama")
# Of tests that run for each policy, or for each of several invariants.
FEWER = settings(max_examples=settings().max_examples // 3)


def made(chosen) -> list[kvprune.TokenPolicy]:
    """A pipeline of listed policies, with a budget each."""
    return [p.make(n) for p, n in zip(*chosen, strict=True)]


# 1. A budget that is never reached changes nothing.


@given(listed, cases(FAMILIES, later=False))
def test_roomy_budgets_equal_the_dense_model(policy, case):
    """Tokens of DynamicCache; logits within what float64 rounding explains."""
    invariants.equals_dense([policy.roomy()], case)


@given(pipelines(), cases(FAMILIES))
def test_below_its_budget_any_pipeline_equals_the_dense_model(chosen, case):
    """As long as every answer had room for everything."""
    invariants.equals_dense_until_something_goes(made(chosen), case)


@given(
    st.sampled_from(["llama", "qwen3", "gpt_neox"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    sampled(SILENT, "the policy observes statistics"),
    st.integers(2, 40),
    st.booleans(),
    seeds,
)
def test_without_statistics_it_is_bit_for_bit(family, dtype, policy, length, padded, seed):
    """The same numbers through the same kernels."""
    inputs = left_padded(prompt(2, length, seed), [0, length // 2 if padded else 0])
    options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    expected = plain_model(family, dtype=dtype).generate(**inputs, **options)
    for policies in ([], [policy.roomy()]):
        cache = kvprune.ComposedCache(policies)
        got = tiny_model(family, dtype=dtype).generate(**inputs, cache=cache, **options)
        for mine, dense in zip(got.logits, expected.logits, strict=True):
            assert torch.equal(mine, dense)


# 2. and 3. What is kept, and how many.


@given(pipelines(), cases(LLAMA, heads=head_counts))
def test_kept_columns_are_unique_seen_sorted_and_never_return(chosen, case):
    """Through any forwards of any lengths, with padding that is never listed."""
    invariants.keeps_what_it_saw(made(chosen), case)


@given(evicting_pipelines(1, 3), cases(LLAMA))
def test_no_layer_holds_more_than_its_budget(chosen, case):
    """After every step, the smallest budget of the pipeline holds, and what was answered."""
    bound = min(p.bound(n) for p, n in chosen)
    policies = [p.make(n) for p, n in chosen]
    invariants.holds_no_more_than_its_budget(policies, case, bound)


# 4. Rows do not depend on each other, nor on left padding.


@given(FAMILIES, pipelines(), st.data())
def test_rows_are_independent(family, chosen, data):
    """A row alone, and the same row padded in a batch: the same kept tokens and outputs."""
    invariants.rows_are_independent(made(chosen), data.draw(cases(st.just(family))))


# 5. Everything that belongs to a slot stays with it.


def coded(driver: Driver, count: int) -> Tokens:
    """Tokens whose keys and values carry their column, and rows and heads that differ."""
    tokens = driver.tokens(count)
    columns = torch.arange(driver.cache.seen, driver.cache.seen + count, dtype=tokens.k.dtype)
    tokens.k[..., 0] = columns
    tokens.v[..., 0] = -columns
    tokens.k[..., 1] = driver.tags[:, None, None]
    return tokens


def check_aligned(driver: Driver) -> None:
    """Each slot's key, value and column agree; statistics are those of a lone accumulation."""
    layer = driver.cache.layers[0]
    columns = layer.columns.expand(-1, driver.kv_heads, -1)
    valid = columns >= 0
    assert torch.equal(layer.keys[..., 0][valid], columns[valid].double())
    assert torch.equal(layer.values[..., 0][valid], -columns[valid].double())
    tags = driver.tags[:, None, None].expand_as(columns)
    assert torch.equal(layer.keys[..., 1][valid], tags[valid])
    for received in layer.statistics.values():
        assert torch.all(received[valid] > 0)


def act(driver: Driver, action: str, index: list[int]) -> None:
    """One thing that `generate` or a user does to a cache, mirrored in the driver."""
    rows = torch.tensor(index)
    if action == "reorder":
        driver.cache.reorder_cache(rows)
    elif action == "repeat":
        driver.cache.batch_repeat_interleave(2)
        rows = torch.arange(driver.rows).repeat_interleave(2)
    elif action == "select":
        driver.cache.batch_select_indices(rows[:2])
        rows = rows[:2]
    elif action == "deepcopy":
        driver.cache, rows = copy.deepcopy(driver.cache), torch.arange(driver.rows)
    elif action == "reset":
        driver.reset()
        return
    driver.rows, driver.mask, driver.tags = len(rows), driver.mask[rows], driver.tags[rows]


ACTIONS = ["reorder", "repeat", "select", "deepcopy", "reset", "prefill", "decode", "decode"]


@given(
    evicting_pipelines(0, 2).filter(lambda chosen: not any(p.of_model for p, _ in chosen)),
    st.lists(st.sampled_from(ACTIONS), min_size=3, max_size=12),
    st.data(),
    seeds,
)
def test_slots_stay_aligned(chosen, actions, data, seed):
    """The column is coded into keys and values and must be found there after everything."""
    driver = Driver([p.make(n) for p, n in chosen], 2, 4, 2, seed=seed)
    driver.step(coded(driver, 9), [0, 4])
    for action in actions:
        if action in ("prefill", "decode") or driver.cache.seen == 0:
            driver.step(coded(driver, 1 if action == "decode" else 5))
        elif driver.rows <= 8:
            picks = st.lists(
                st.integers(0, driver.rows - 1), min_size=driver.rows, max_size=driver.rows
            )
            act(driver, action, data.draw(picks))
        if driver.cache.seen:
            check_aligned(driver)
            assert driver.cache.columns(0).shape[0] == driver.rows


@given(listed, budgets, cases(FAMILIES), st.lists(st.integers(0, 1), min_size=2, max_size=2))
def test_rows_keep_their_numbers_when_they_move(policy, budget, case, beams):
    """After a reorder each row goes on as the row it came from would have."""
    invariants.moved_rows_go_on([policy.make(budget)], case, beams)


@pytest.mark.parametrize(
    "invariant",
    [
        invariants.values_belong_to_their_columns,
        invariants.copies_and_files_go_on,
        invariants.crop_takes_back_or_refuses,
        invariants.drafts_leave_no_trace,
        invariants.reset_is_as_new,
    ],
)
@FEWER
@given(chosen=pipelines(), case=cases(LLAMA))
def test_a_cache_is_whole_after(invariant, chosen, case):
    """Eviction, copies, files, taking back, drafts and reset."""
    invariant(made(chosen), case)


# 6. Composition.


@given(pipelines(most=3), cases(LLAMA))
def test_a_pipeline_equals_its_policies_applied_by_hand(chosen, case):
    """Each policy's hooks called in turn on what the one before it left."""
    invariants.pipeline_is_by_hand(made(chosen), case)


@given(listed, budgets, cases(LLAMA))
def test_a_policy_united_with_itself_is_itself(policy, budget, case):
    """`a | a` equals `a`."""
    invariants.united_with_itself([policy.make(budget)], case)


@given(pipelines(), cases(LLAMA))
def test_caches_share_policies(chosen, case):
    """A policy holds no state."""
    invariants.caches_share_a_policy(made(chosen), case)


@given(evicting, budgets, evicting, budgets, st.integers(2, 24), seeds)
def test_a_union_keeps_what_either_keeps(first, n, second, m, length, seed):
    """After one forward: the union of what each keeps alone."""
    ids = prompt(2, length, seed)
    one, two = first.make(n), second.make(m)
    if one.when != two.when:
        with pytest.raises(KVPruneError, match="asked at different times"):
            one | two
    for policy in (one, two):
        object.__setattr__(policy, "when", None)
    runs = [Run(tiny_model(), [policy]) for policy in (one, two, one | two)]
    for run in runs:
        run(ids)
    for layer in range(LAYERS):
        each = [run.cache.columns(layer).expand(-1, 2, -1).flatten(0, 1) for run in runs]
        for a, b, both in zip(*(c.tolist() for c in each), strict=True):
            assert set(both) - {-1} == (set(a) | set(b)) - {-1}


# 7. Lengths and positions.


@given(pipelines(), cases(LLAMA))
def test_logical_and_physical_length(chosen, case):
    """`seen` counts columns, padding included; `get_seq_length` and masks follow it."""
    invariants.lengths_are_logical(made(chosen), case)


# 8. Memory.

LIMITED = st.none() | st.lists(st.integers(0, LAYERS - 1), max_size=3, unique=True)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@given(budget=budgets, layers=LIMITED, length=st.integers(2, 40), steps=st.integers(1, 20))
def test_bytes_held_are_those_of_the_kept_slots(
    policy: Listed, family, budget, layers, length, steps
):
    """Of each layer by itself, also where a policy is for some layers alone; storage counted."""
    made = limited(policy.make(budget), layers)
    invariants.bytes_are_of_kept_slots([made], Case((length, *[1] * steps), family=family))


class ByLayer(kvprune.TokenPolicy):
    """Layer 0 keeps two slots, and each one more than the layer before."""

    def rank_slots(self, slots):
        """The newest."""
        budget = torch.full_like(slots.first, 2 + 5 * slots.layer)
        return kvprune.Ranking(slots.columns.double(), slots.newest(1), budget)


@given(cases(LLAMA))
def test_bytes_held_where_budgets_differ_by_layer(case):
    """All that layer 0 holds says nothing of the others."""
    invariants.bytes_are_of_kept_slots([ByLayer()], case)


def limited(policy: Any, layers: list[int] | None) -> Any:
    """A copy for these layers alone."""
    policy = copy.copy(policy)
    object.__setattr__(policy, "layers", layers)
    return policy


# 11. Errors inside a forward.


@given(
    st.integers(0, LAYERS - 1),
    st.sampled_from(["rank_hidden", "rank_slots"]),
    st.sampled_from([0, 10]),
    pipelines(),
)
def test_an_error_inside_a_forward_makes_the_cache_refuse_until_reset(layer, hook, column, chosen):
    """Closed, said so, never half-updated and silently used; after reset as good as new."""
    case = Case((10, 1, 3))
    invariants.error_needs_a_reset(made(chosen), case, layer, hook, column)


# 12. What policies promise, and what all of them must heed.


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@FEWER
@given(budget=budgets, case=cases(FAMILIES))
def test_promises_are_kept(policy, budget, case):
    """What is promised is so, and makes no difference to what is kept."""
    invariants.promises_are_kept([policy.make(budget)], case)


@pytest.mark.parametrize(
    "invariant",
    [
        invariants.views_are_only_read,
        invariants.slots_have_no_order,
        invariants.layers_restrict,
    ],
)
@FEWER
@given(policy=listed, budget=budgets, case=cases(LLAMA))
def test_what_every_policy_heeds(invariant, policy, budget, case):
    """Views are for reading, slots have no order, and `layers` restricts."""
    invariant([policy.make(budget)], case)


@pytest.mark.parametrize("trained", ["all", "q", "v", "qv", "-"])
@pytest.mark.parametrize("policies", [[], [H2O(3, 3)], [StreamingLLM(2, 4)]], ids=repr)
def test_gradients_flow_and_statistics_are_detached(trained, policies):
    """With gradients enabled, through prefill and decode; the same numbers as without.

    Also where only some projections are trained, as LoRA does: attention saves keys for the
    queries' gradient even where keys have none of their own.
    """
    model = kvprune.attach(fresh_model())
    for name, parameter in model.named_parameters():
        wanted = any(f"self_attn.{letter}_proj" in name for letter in trained)
        parameter.requires_grad_(trained == "all" or wanted)
    cache, quiet = kvprune.ComposedCache(policies), kvprune.ComposedCache(policies)
    ids = prompt(2, 24)
    total = torch.zeros((), dtype=torch.float64)
    for new in (ids[:, :20], ids[:, 20:21], ids[:, 21:22], ids[:, 22:]):
        logits = model(new, past_key_values=cache).logits
        with torch.no_grad():
            expected = model(new, past_key_values=quiet).logits
        torch.testing.assert_close(logits.detach(), expected, rtol=1e-10, atol=1e-11)
        total = total + logits.square().sum()
    if trained != "-":
        total.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    for layer in cache.layers:
        assert not any(value.requires_grad for value in layer.statistics.values())


def test_a_prompt_read_in_inference_mode_can_be_gone_on_with_outside():
    """What inference mode made cannot be written in place outside of it."""
    ids, logits = prompt(2, 24), []
    for mode in (torch.no_grad, torch.inference_mode):
        run = Run(tiny_model(), [H2O(3, 3)])
        with mode():
            feed(run, ids[:, :20], torch.ones(2, 20, dtype=torch.long), [18, 1, 1])
        logits.append(feed(run, ids[:, 20:], torch.ones(2, 4, dtype=torch.long), [1, 2, 1]))
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


@pytest.mark.parametrize("policies", [[], [sdtp_pruner(0.6)]], ids=["dense", "sdtp"])
def test_crop_takes_back_what_was_read_last(policies):
    """Where nothing evicts: the cache goes on as if the columns had never been shown."""
    ids = prompt(2, 30)
    mask = left_padded(ids, [0, 9])["attention_mask"]
    run, twin = (Run(tiny_model(), policies) for _ in range(2))
    feed(run, ids, mask, [20, 1, 1, 1, 1])
    run.cache.crop(-3)
    run.mask = run.mask[:, :-3]
    feed(twin, ids, mask, [20, 1])
    assert run.kept() == twin.kept() and run.cache.seen == 21
    more = [1, 1, 1, 1, 2, 1]
    one, two = (feed(r, ids[:, 21:], mask[:, 21:], more) for r in (run, twin))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
