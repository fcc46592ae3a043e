"""The invariants of the design, as properties over every listed policy.

A new policy joins by being listed once, in `strategies.POLICIES`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune.policies import H2O, StreamingLLM
from kvprune.slots import SLACK

from .driver import D, Driver, Tokens
from .models import LAYERS, fresh_model, left_padded, plain_model, positions, prompt, tiny_model
from .naive import naive_select
from .strategies import (
    EVICTING,
    POLICIES,
    Listed,
    budgets,
    chunked,
    evicting,
    evicting_pipelines,
    head_counts,
    inside,
    listed,
    pipelines,
    sdtp_pruner,
    seeds,
)

FAMILIES = st.sampled_from(["llama", "qwen3", "mistral-window", "gpt_neox"])


class Run:
    """Forwards of one cache on one model, with the padding mask kept beside it."""

    def __init__(self, model, policies) -> None:
        self.model, self.cache = model, kvprune.ComposedCache(policies)
        self.mask: torch.Tensor | None = None

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the last token, `[B, V]`."""
        mask = torch.ones_like(ids) if mask is None else mask
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        with torch.no_grad():
            return self.model(
                ids,
                attention_mask=self.mask,
                position_ids=positions(self.mask)[:, -ids.shape[1] :],
                past_key_values=self.cache,
                logits_to_keep=1,
            ).logits[:, -1]

    def kept(self) -> list[list[list[int]]]:
        """Columns by layer and then by row and head, flattened."""
        heads = self.model.config.num_key_value_heads
        layers = [self.cache.columns(i).expand(-1, heads, -1) for i in range(LAYERS)]
        return [[[int(c) for c in h if c >= 0] for h in layer.flatten(0, 1)] for layer in layers]


def feed(run: Run, ids: torch.Tensor, mask: torch.Tensor, steps: list[int]) -> list[torch.Tensor]:
    """Runs forwards of the given sizes one after the other."""
    logits, start = [], 0
    for count in steps:
        new = slice(start, start + count)
        logits.append(run(ids[:, new], mask[:, new]))
        start += count
    return logits


# 1. A budget that is never reached changes nothing.


@given(FAMILIES, st.sampled_from(POLICIES), st.data(), seeds)
def test_roomy_budgets_equal_the_dense_model(family, policy, data, seed):
    """Tokens of DynamicCache; logits within what float64 rounding explains."""
    length = data.draw(st.integers(2, 30))
    inputs = left_padded(prompt(2, length, seed), [0, data.draw(st.integers(0, length - 1))])
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    expected = plain_model(family).generate(**inputs, **options)
    cache = kvprune.ComposedCache([policy.roomy()])
    got = tiny_model(family).generate(**inputs, cache=cache, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for mine, dense in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-10, atol=1e-11)


@given(
    st.sampled_from(["llama", "qwen3", "gpt_neox"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([p for p in POLICIES if not p.roomy().statistics]),
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


@given(pipelines(), st.data(), head_counts, seeds)
def test_kept_columns_are_unique_seen_sorted_and_never_return(chosen, data, heads, seed):
    """Through any forwards of any lengths, with padding that is never listed."""
    parts, sizes = chosen
    policies = [p.make(n) for p, n in zip(parts, sizes, strict=True)]
    run = Run(tiny_model(heads=heads[0], kv_heads=heads[1]), policies)
    length = data.draw(st.integers(1, 24))
    padding = [0, data.draw(st.integers(0, length - 1))]
    steps = [*data.draw(chunked(length)), 1, 1, 1, 5, 1, 1]
    ids = prompt(2, sum(steps), seed)
    mask = left_padded(ids, padding)["attention_mask"]
    start, gone = 0, [set[int]() for _ in range(1000)]
    for count in steps:
        run(ids[:, start : start + count], mask[:, start : start + count])
        start += count
        for layer in range(LAYERS):
            columns = run.cache.columns(layer)
            assert columns.dtype == torch.int64
            assert torch.equal(columns, columns.sort(-1).values)
            assert columns.shape[0] == 2 and columns.shape[1] in (1, heads[1])
            for row in range(2):
                for head in range(columns.shape[1]):
                    kept = [int(c) for c in columns[row, head] if c >= 0]
                    assert len(set(kept)) == len(kept)
                    assert set(kept) <= set(range(padding[row], start))
                    lost = gone[(layer * 2 + row) * 8 + head]
                    assert not lost & set(kept)
                    lost |= set(range(start)) - set(kept)


@given(evicting_pipelines(1, 3), st.data(), seeds)
def test_no_layer_holds_more_than_its_budget(chosen, data, seed):
    """After every step, the smallest budget of the pipeline holds."""
    bound = min(p.bound(n) for p, n in chosen)
    run = Run(tiny_model(), [p.make(n) for p, n in chosen])
    length = data.draw(st.integers(1, 24))
    steps = [*data.draw(chunked(length)), 1, 1, 7, 1]
    ids = prompt(2, sum(steps), seed)
    start = 0
    for count in steps:
        run(ids[:, start : start + count])
        start += count
        for layer in range(LAYERS):
            assert run.cache.columns(layer).shape[-1] <= bound
            assert run.cache.columns(layer).shape[-1] >= min(start, 1)


# 4. Rows do not depend on each other, nor on left padding.


@given(FAMILIES, pipelines(), st.data(), seeds)
def test_rows_are_independent(family, chosen, data, seed):
    """A row alone, and the same row padded in a batch: the same kept tokens and outputs."""
    parts, sizes = chosen
    length, pad = data.draw(st.integers(2, 24)), data.draw(st.integers(0, 6))
    steps, ids = [length, 1, 1, 4, 1], prompt(1, length + 7, seed)
    other = prompt(1, pad + length + 7, seed + 1)
    batch = torch.cat([torch.nn.functional.pad(ids, (pad, 0)), other])
    mask = left_padded(batch, [pad, data.draw(st.integers(0, pad + length - 1))])["attention_mask"]
    alone, together = (
        Run(tiny_model(family), [p.make(n) for p, n in zip(parts, sizes, strict=True)])
        for _ in range(2)
    )
    expected = feed(alone, ids, torch.ones_like(ids), steps)
    got = feed(together, batch, mask, [steps[0] + pad, *steps[1:]])
    for mine, single in zip(got, expected, strict=True):
        torch.testing.assert_close(mine[:1], single, rtol=1e-9, atol=1e-10)
    for layer in range(LAYERS):
        one, two = alone.cache.columns(layer)[0], together.cache.columns(layer)[0]
        for head in range(two.shape[0]):
            mine = [int(c) - pad for c in two[head] if c >= 0]
            assert mine == [int(c) for c in one[min(head, one.shape[0] - 1)] if c >= 0]


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
    evicting_pipelines(0, 2),
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


@given(evicting, budgets, st.lists(st.integers(0, 1), min_size=2, max_size=2), seeds)
def test_rows_keep_their_numbers_when_they_move(policy, budget, beams, seed):
    """After a reorder each row goes on as the row it came from would have."""
    ids = prompt(2, 20, seed)
    mask = left_padded(ids, [0, 8])["attention_mask"]
    run = Run(tiny_model(), [policy.make(budget)])
    run(ids, mask)
    twin = copy.copy(run)
    twin.cache = copy.deepcopy(run.cache)
    order = torch.tensor(beams)
    run.cache.reorder_cache(order)
    run.mask = run.mask[order]
    new = prompt(2, 5, seed + 1)
    for i in range(5):
        moved = run(new[:, i : i + 1][order])
        torch.testing.assert_close(moved, twin(new[:, i : i + 1])[order], rtol=1e-10, atol=1e-11)


# 6. Composition.


@given(pipelines(most=3), st.integers(2, 24), seeds)
def test_a_pipeline_equals_its_policies_applied_by_hand(chosen, length, seed):
    """Each policy's hooks called in turn on what the one before it left."""
    parts, sizes = chosen
    policies = [p.make(n) for p, n in zip(parts, sizes, strict=True)]
    expected, got = Run(tiny_model(), [ByHand(policies)]), Run(tiny_model(), policies)
    steps, ids = [length, 1, 1, 3, 1], prompt(2, length + 6, seed)
    logits = [feed(run, ids, torch.ones_like(ids), steps) for run in (expected, got)]
    assert expected.kept() == got.kept()
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-10, atol=1e-11)


class ByHand(kvprune.TokenPolicy):
    """Applies policies one after the other, entry by entry, in plain Python."""

    statistics = ("attention",)

    def __init__(self, policies) -> None:
        super().__init__()
        self.policies = policies
        self.__dict__.update(inside(policies))

    def rank_hidden(self, tokens):
        """The last token's logits are asked for in these tests, so it is protected."""
        last = torch.zeros_like(tokens.valid)
        last[:, -1] = True
        return self._ranking("rank_hidden", tokens, last & tokens.valid)

    def rank_slots(self, slots):
        """Nothing is protected but by the policies."""
        return self._ranking("rank_slots", slots, None)

    def _ranking(self, hook, view, asked):
        hidden = hook == "rank_hidden"
        for policy in self.policies:
            ranking = getattr(policy, hook)(view)
            if ranking is None:
                continue
            columns = view.columns[:, None] if hidden else view.columns
            kept = naive_select(ranking, columns, None if asked is None else asked[:, None])
            columns = torch.where(kept, columns, -1)
            columns, kept = (columns[:, 0], kept[:, 0]) if hidden else (columns, kept)
            view = replace(view, columns=columns, valid=kept)
        valid = view.valid[:, None] if hidden else view.valid
        return kvprune.Ranking(valid.double(), valid, valid.sum(-1))


@given(listed, budgets, st.integers(2, 24), seeds)
def test_a_policy_united_with_itself_is_itself(policy, budget, length, seed):
    """`a | a` equals `a`."""
    ids = prompt(2, length + 6, seed)
    mask = left_padded(ids, [0, length // 2])["attention_mask"]
    one, two = policy.make(budget), policy.make(budget)
    runs = [Run(tiny_model(), [one]), Run(tiny_model(), [one | two])]
    logits = [feed(run, ids, mask, [length, 1, 1, 3, 1]) for run in runs]
    assert runs[0].kept() == runs[1].kept()
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


@given(evicting, budgets, evicting, budgets, st.integers(2, 24), seeds)
def test_a_union_keeps_what_either_keeps(first, n, second, m, length, seed):
    """After one forward: the union of what each keeps alone."""
    ids = prompt(2, length, seed)
    one, two = first.make(n), second.make(m)
    runs = [Run(tiny_model(), [policy]) for policy in (one, two, one | two)]
    for run in runs:
        run(ids)
    for layer in range(LAYERS):
        each = [run.cache.columns(layer).expand(-1, 2, -1).flatten(0, 1) for run in runs]
        for a, b, both in zip(*(c.tolist() for c in each), strict=True):
            assert set(both) - {-1} == (set(a) | set(b)) - {-1}


# 7. Lengths and positions.


@given(pipelines(), st.integers(2, 20), seeds)
def test_logical_and_physical_length(chosen, length, seed):
    """`seen` counts columns, padding included; `get_seq_length` and masks follow it."""
    parts, sizes = chosen
    run = Run(tiny_model(), [p.make(n) for p, n in zip(parts, sizes, strict=True)])
    ids = prompt(2, length + 3, seed)
    feed(run, ids, torch.ones_like(ids), [length, 1, 1, 1])
    assert run.cache.seen == run.cache.get_seq_length() == length + 3
    assert len(run.cache) == LAYERS
    for layer in range(LAYERS):
        physical = run.cache.layers[layer].keys.shape[2]
        assert 0 <= physical - run.cache.columns(layer).shape[-1] <= SLACK


# 8. Memory.


@pytest.mark.parametrize("policy", EVICTING, ids=repr)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@given(budget=budgets, steps=st.integers(1, 20), seed=seeds)
def test_bytes_held_are_those_of_the_kept_slots(policy: Listed, family, budget, steps, seed):
    """With a slack of at most 8 slots a layer once a budget is full; all storage counted."""
    run = Run(tiny_model(family), [policy.make(budget)])
    ids = prompt(2, 40 + steps, seed)
    feed(run, ids, torch.ones_like(ids), [40] + [1] * steps)
    cache, bytes_needed, slack = run.cache, 0, 0
    for layer in cache.layers:
        heads = layer.keys.shape[1]
        slot = 2 * (heads * 2 * D * 8 + layer.columns.shape[1] * 8 + heads * 8 * len(layer.names))
        bytes_needed += slot * cache.columns(0).shape[-1]
        slack += slot * SLACK + (0 if layer.hole is None else layer.hole.nbytes)
    rows = 2 * 2 * 8
    assert bytes_needed < cache.nbytes <= bytes_needed + slack + rows


# 11. Errors inside a forward.


class Fails(kvprune.TokenPolicy):
    """Raises at one layer of the forward that reaches a column."""

    def __init__(self, layer: int, column: int, hook: str, answers: dict[str, Any]) -> None:
        super().__init__()
        self.at, self.column, self.hook = layer, column, hook
        self.__dict__.update(answers)

    def rank_hidden(self, tokens):
        """Raises, if it is its turn."""
        if self.hook == "rank_hidden" and tokens.layer == self.at:
            raise RuntimeError("as planned")

    def rank_slots(self, slots):
        """Raises, if it is its turn."""
        if self.hook == "rank_slots" and slots.layer == self.at and slots.seen > self.column:
            raise RuntimeError("as planned")


@given(
    st.integers(0, LAYERS - 1),
    st.sampled_from(["rank_hidden", "rank_slots"]),
    st.sampled_from([0, 10]),
    pipelines(),
)
def test_an_error_inside_a_forward_makes_the_cache_refuse_until_reset(layer, hook, column, chosen):
    """Closed, said so, never half-updated and silently used; after reset as good as new."""
    policies = [p.make(n) for p, n in zip(*chosen, strict=True)]
    run = Run(tiny_model(), [Fails(layer, column, hook, inside(policies)), *policies])
    ids = prompt(2, 14)
    with pytest.raises(RuntimeError, match="as planned"):
        feed(run, ids, torch.ones_like(ids), [10, 1, 3])
    for use in (lambda: run(ids[:, :1]), lambda: run.cache.reorder_cache(torch.tensor([1, 0]))):
        with pytest.raises(kvprune.KVPruneError, match="reset"):
            use()
    run.cache.reset()
    run.cache.policies = tuple(policies)
    run.mask = None
    again = feed(run, ids, torch.ones_like(ids), [10, 1, 3])
    fresh = Run(tiny_model(), policies)
    for one, two in zip(again, feed(fresh, ids, torch.ones_like(ids), [10, 1, 3]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-11)


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
