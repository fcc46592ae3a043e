"""Questions that are not known when their context is compressed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.evaluation.compare.plan import Plan
from kvprune.evaluation.measure.flops import Flops, counting
from kvprune.evaluation.measure.reader import CacheReader, Reading
from kvprune.evaluation.tasks import task
from kvprune.evaluation.tasks.perplexity import Perplexity
from kvprune.evaluation.tasks.unknown import QuestionUnknown
from kvprune.policies import H2O, AdaKV, KVzip, SnapKV, StreamingLLM

from ..support.models import prompt, tiny_model
from ..support.strategies import sdtp_pruner
from .test_reader import Letters
from .test_tasks import KINDS, data, tokenizer

__all__ = ["data"]  # A fixture: small texts in the place of the real ones.

NAMES = ("squad", "needle", "kv", "words", "tracking")

PIPELINES: dict[str, list[Any]] = {
    "dense": [],
    "SnapKV": [SnapKV(9, window=3)],
    "AdaKV": [AdaKV(SnapKV(9, window=3))],
    "H2O": [H2O(4, 4)],
    "KVzip": [KVzip(9)],
    "SDTP": [sdtp_pruner(0.6)],
    "SDTP, StreamingLLM": [sdtp_pruner(0.6), StreamingLLM(2, 9)],
}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_context_alone_is_the_prompt(name):
    """Then the question's tokens and the answer's, as if read one by one."""
    policies, model = PIPELINES[name], tiny_model()
    ids, answer = prompt(1, 40, 3), prompt(1, 5, 4)[0].tolist()
    cache, found = ComposedCache(policies), []
    logits = kvprune.read(model, cache, ids[:, :29])[0]
    with torch.no_grad():
        for token in ids[0, 29:].tolist() + answer:
            found.append(logits.log_softmax(-1)[token].item())
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    lead = Reading.of(model, ids[0].tolist(), ComposedCache(policies), behind=11)
    reader = CacheReader(model, Letters(), lead)
    assert reader.log_likelihood(answer) == pytest.approx(found[11:], abs=1e-9)
    lead = Reading.of(model, ids[0].tolist(), ComposedCache(policies), behind=11)
    asked = CacheReader(model, Letters(), lead)
    assert len(asked.generate(4)) == 4


def test_what_it_costs():
    """To the last FLOP, where nothing is evicted; bytes are those behind the context."""
    model, ids = tiny_model(), prompt(1, 60, 3)[0].tolist()
    flops = Flops.measured(model)
    with counting() as counter:
        reader = CacheReader(model, Letters(), Reading.of(model, ids, ComposedCache(), 21))
    cost = reader.cost(flops, 0.0)
    assert cost.prefill_flops == pytest.approx(counter.get_total_flops(), rel=1e-12)
    assert cost.prompt_tokens == 60 and set(cost.entered) == {60}
    alone = ComposedCache()
    kvprune.read(model, alone, torch.tensor([ids[:39]]))
    assert cost.bytes_held == alone.nbytes
    assert set(cost.held) == {39} and set(cost.kept) == {60}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_where_the_question_begins(name, kind):
    """What stands before it is the same whatever is asked of the context."""
    words, size = tokenizer(kind), 700
    known = task(name).samples(words, size, 2, 0)
    unknown = QuestionUnknown(task(name)).samples(words, size, 2, 0)
    for one, other in zip(known, unknown, strict=True):
        assert one.prompt == other.prompt and one.behind == 1
        assert other.behind == len(one.prompt) - one.context > 5
        text = words.decode(one.prompt[: one.context])
        asked = words.decode(one.prompt[one.context :])
        assert len(text) > len(asked)
        # The bare prompt is that of no context, with the same question.
        bare = words.decode(one.bare)
        assert bare.endswith(asked[-20:])


def test_both_may_be_asked_for():
    """As tasks of their own; a task without a question is refused before anything runs."""
    with pytest.raises(KVPruneError, match="--question 'no'"):
        Plan(["h2o"], ["needle"], [100], [], 1, 0, "no")
    names = [t.name for t in Plan(["h2o"], ["needle"], [100], [], 1, 0, "both").found]
    assert names == ["needle", "needle, question unknown"]
    with pytest.raises(KVPruneError, match="no question behind their context"):
        QuestionUnknown(Perplexity()).samples(tokenizer("gpt2"), 300, 1, 0)
