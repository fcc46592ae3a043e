"""`torch.compile(model.forward)`: one graph for a decode step, and the same numbers."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import kvprune
from kvprune.policies import H2O
from kvprune.policy import OneBudget, Ranking, SlotView
from kvprune.statistics import Attention, Gate, Queries, Statistic, Survival

from ..engine.test_host import FIXED
from ..support.models import fresh_model, prompt
from ..support.strategies import POLICIES, sdtp_pruner


@pytest.mark.parametrize(
    "policies",
    [
        pytest.param(policies, marks=() if name == "H2O" else pytest.mark.slow, id=name)
        for name, policies in FIXED.items()
    ],
)
@pytest.mark.parametrize("store", [None, kvprune.Quantized(4, 8)], ids=repr)
def test_a_decode_step_is_one_graph(policies, store):
    """Bit for bit, and compiled no more than twice: behind the prompt, and at a full budget."""
    model, ids, counter = kvprune.attach(fresh_model()), prompt(1, 28), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend=counter, fullgraph=True)
    caches = [kvprune.ComposedCache(policies, store=store) for _ in range(2)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of torch, on Python 3.13.0 alone.
        warnings.filterwarnings("ignore", "Guards may run slower")
        for cache in caches:
            model(ids[:, :20], past_key_values=cache)
        for i in range(20, 28):
            _same_logits(compiled, model, ids[:, i : i + 1], caches)
    assert counter.frame_count == 2


ONE_GRAPH = (
    "snapkv",
    "pyramidkv",
    "tova",
    "knorm-always",
    "keydiff",
    "observed-always",
    "expected",
)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [p for p in POLICIES if p.name in ONE_GRAPH], ids=repr)
def test_policies_whose_budget_is_constant_or_not_due_make_one_graph(policy):
    """Those that docs/gpu.md names."""
    torch._dynamo.reset()
    model, ids = kvprune.attach(fresh_model()), prompt(1, 24)
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    caches = [kvprune.ComposedCache([policy.make(8)]) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :20], past_key_values=cache)
        for i in range(20, 24):
            _same_logits(compiled, model, ids[:, i : i + 1], caches, near=1e-12)


class Linear(nn.Module):
    """A gate."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 1).double()

    def forward(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        return self.linear(hidden).transpose(1, 2)


@dataclass(frozen=True, repr=False)
class Reads(OneBudget):
    """Keeps the slots of which a statistic says most, and the newest."""

    read: Statistic = field(default_factory=Attention)

    constant_budget = True

    @property
    def statistics(self) -> tuple[Statistic, ...]:  # type: ignore[override]
        return (self.read,)

    def rank_slots(self, slots: SlotView) -> Ranking:
        if isinstance(self.read, Queries):
            score = slots.looks(self.read.count).mean((2, 3))
        else:
            score = slots.statistic(self.read).nan_to_num(0)
        return Ranking(score, slots.newest(1).expand_as(score), slots.tokens(self.budget))


READS = {
    "the most": [Reads(8, Attention(over="max"))],
    "decaying": [Reads(8, Attention(decay=0.9))],
    "looks": [Reads(8, Queries(4))],
    "a gate": [Reads(8, Gate(Linear()))],
    "how far tokens came": [sdtp_pruner(0.6), Reads(8, Survival(), when="prompt")],
}


@pytest.mark.slow
@pytest.mark.parametrize("policies", READS.values(), ids=READS)
def test_what_reads_a_statistic_in_each_step_makes_one_graph(policies):
    """Those that docs/gpu.md names."""
    torch._dynamo.reset()
    model, ids = kvprune.attach(fresh_model()), prompt(1, 28)
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    caches = [kvprune.ComposedCache(policies) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :20], past_key_values=cache)
        for i in range(20, 28):
            _same_logits(compiled, model, ids[:, i : i + 1], caches, near=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_any_policy_compiles_with_breaks(policy):
    """A step that has been compiled is not compiled again."""
    torch._dynamo.reset()
    model, ids, counter = kvprune.attach(fresh_model()), prompt(1, 28), CompileCounter()
    compiled = torch.compile(model.forward, backend=counter)
    caches = [kvprune.ComposedCache([policy.make(8)]) for _ in range(2)]
    frames = []
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :20], past_key_values=cache)
        for i in range(20, 28):
            # Sums within a step that is compiled in pieces may round in another way.
            _same_logits(compiled, model, ids[:, i : i + 1], caches, near=1e-12)
            frames.append(counter.frame_count)
    # A union keeps now more and now fewer, which are two ways to go.
    assert frames[0] > 0 and frames[5] == frames[7]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="code for CPUs needs g++")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_generated_code_gives_the_same_tokens(mode):
    """By inductor, with a policy that observes; sums are in another order there."""
    torch._dynamo.reset()
    model, ids = kvprune.attach(fresh_model()), prompt(1, 24)
    compiled, logits = torch.compile(model.forward, fullgraph=True, mode=mode), []
    for run in (compiled, model):
        cache = kvprune.ComposedCache([H2O(4, 4)])
        with torch.no_grad():
            logits.append([model(ids[:, :18], past_key_values=cache).logits[:, -1:]])
            for i in range(18, 24):
                logits[-1].append(run(ids[:, i : i + 1], past_key_values=cache).logits)
    one, two = (torch.cat(each, 1) for each in logits)
    assert torch.equal(one.argmax(-1), two.argmax(-1))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


def _same_logits(compiled, model, new, caches, near=0.0):
    pairs = zip((compiled, model), caches, strict=True)
    one, two = (run(new, past_key_values=cache) for run, cache in pairs)
    torch.testing.assert_close(one.logits, two.logits, rtol=near, atol=near)
