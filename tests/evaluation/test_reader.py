"""A model that has read a prompt: what it says, and what that cost."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvprune
from kvprune import KVPruneError, Ranking
from kvprune.evaluation.measure.flops import Flops, counting
from kvprune.evaluation.measure.reader import CacheReader, Reading, own_prefill_flops
from kvprune.evaluation.measure.reading import read_lead, read_prompt
from kvprune.policies import H2O, SDTP, ExpectedAttention, KVzip, SnapKV, StreamingLLM

from ..support.fake_tasks import AtTheEnd
from ..support.family_models import attached_family
from ..support.models import LAYERS, fresh_model, prompt, tiny_model
from ..support.strategies import pipelines, sdtp_pruner


class Letters:
    """A tokenizer: each token is a letter."""

    eos_token_id: int | None = None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Never special."""
        return "".join(chr(ord("A") + i) for i in ids)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """As it stands."""
        assert not add_special_tokens
        return [ord(c) - ord("A") for c in text]


MODELS = ["llama", "mistral-window", "gpt_neox"]


def reader(policies: list[Any], ids: Tensor, model: Any = None) -> CacheReader:
    """One of a row of ids."""
    model = model or tiny_model()
    lead = Reading.of(model, ids[0].tolist(), kvprune.ComposedCache(policies))
    return CacheReader(model, Letters(), lead)


def made(chosen: tuple[list[Any], list[int]]) -> list[kvprune.TokenPolicy]:
    """The policies of a drawn pipeline."""
    return [listed.make(budget) for listed, budget in zip(*chosen, strict=True)]


@given(pipelines(always=True), st.integers(1, 40), st.integers(1, 9), st.sampled_from(MODELS))
def test_what_is_generated_is_what_generate_generates(chosen, length, count, family):
    """Greedily, with the same policies, where it reads the prompt's last token by itself."""
    model, ids = tiny_model(family), prompt(1, length, length)
    options = {"max_new_tokens": count, "do_sample": False}
    if length > 1:
        options["prefill_chunk_size"] = length - 1
    cache = kvprune.ComposedCache(made(chosen))
    expected = model.generate(ids, cache=cache, **options)[0, length:]
    asked = reader(made(chosen), ids, model)
    assert Letters().encode(asked.generate(count), False) == expected.tolist()
    for layer in range(LAYERS):
        assert torch.equal(asked.cache.columns(layer), cache.columns(layer))


def test_the_first_token_is_told_from_what_is_left():
    """In one forward it would be dense's, whatever the budget."""
    ids, likely = prompt(1, 40), dict[str, float]()
    once = SnapKV(2, window=1, kernel=1)
    for policies in ([], [H2O(1, 1)], [StreamingLLM(1, 1)], [once]):
        (likely[repr(policies)],) = reader(policies, ids).log_likelihood([7])
    assert len(set(likely.values())) == 4


@settings(max_examples=10)
@given(
    pipelines(),
    st.integers(2, 40),
    st.integers(0, 20),
    st.sampled_from(MODELS),
    st.sampled_from([1, 3, 64]),
)
def test_a_text_is_as_likely_as_token_by_token(chosen, length, count, family, piece):
    """However many go at once: each token is read after what was evicted for those before it."""
    model, ids = tiny_model(family), prompt(1, length, length)
    text = prompt(1, max(count, 1), count + 1)[0, :count].tolist()
    cache, found = kvprune.ComposedCache(made(chosen)), []
    logits = read_prompt(model, cache, ids)[0]
    with torch.no_grad():
        for token in text:
            found.append(float(logits.log_softmax(-1)[token]))
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    asked = reader(made(chosen), ids, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvprune.evaluation.measure.reader.PIECE", piece)
        said = asked.log_likelihood(Letters().decode(text, True) if count % 2 else text)
    assert said == pytest.approx(found, abs=1e-9)
    assert asked.cost(Flops.measured(model), 0.0).decode_tokens_per_second is None


@pytest.mark.parametrize("family", ["deepseek_v3", "bloom"])
def test_a_text_on_models_whose_drafts_cannot_be_taken_back(family):
    """One token a forward, where a policy evicts."""
    model: Any = attached_family(family)
    ids, text = prompt(1, 20), prompt(1, 9, 1)[0].tolist()
    for policies in ([], [H2O(3, 4)]):
        cache, found = kvprune.ComposedCache(policies), []
        logits = read_prompt(model, cache, ids)[0]
        with torch.no_grad():
            for token in text:
                found.append(float(logits.log_softmax(-1)[token]))
                logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
        said = reader(policies, ids, model).log_likelihood(text)
        assert said == pytest.approx(found, abs=1e-6)


def test_it_ends_at_eos(monkeypatch):
    """Of the generation config, or else of the tokenizer; the token itself is not said."""
    model: Any = tiny_model()
    whole = reader([], prompt(1, 20)).generate(12)
    end = Letters().encode(whole, False)[5]
    first = whole.index(whole[5])
    monkeypatch.setattr(Letters, "eos_token_id", end)
    assert reader([], prompt(1, 20)).generate(12) == whole[:first]
    for named in (end, [0, end]):
        monkeypatch.setattr(Letters, "eos_token_id", None)
        monkeypatch.setattr(model.generation_config, "eos_token_id", named)
        assert reader([], prompt(1, 20)).generate(12) == whole[:first]


def test_costs_are_those_of_the_cache():
    """After the prompt, and at the most; tokens by layer as they entered."""
    model, ids = tiny_model(), prompt(1, 40)
    policies = [sdtp_pruner(0.6), H2O(3, 4)]
    cache = kvprune.ComposedCache(policies)
    read_prompt(model, cache, ids)
    asked = reader(policies, ids)
    asked.generate(4)
    cost = asked.cost(Flops.measured(model), 5.0)
    # Of 39 tokens 23 and then 14 stay; the last one enters every layer.
    assert cost.prompt_tokens == 40 and cost.entered == (40, 24, 24, 15)
    assert cost.kept == (7.0,) * LAYERS
    evicted = kvprune.ComposedCache(policies)
    read_lead(model, evicted, ids)
    assert cost.bytes_held == evicted.nbytes <= cost.bytes_peak
    assert cost.prefill_seconds > 0.0
    assert cost.decode_tokens_per_second is not None and cost.decode_tokens_per_second > 0.0
    flops = Flops.measured(model)
    read = flops.of_prompt(39, (39, 23, 23, 14)) + flops.of_prompt(1, (1,) * LAYERS, (8,) * LAYERS)
    assert cost.prefill_flops == read + 5.0
    scored = reader([H2O(3, 4)], ids)
    scored.log_likelihood([1] * 60)
    # Drafts that are on record do not count once they are read.
    assert scored.cost(Flops.measured(model), 0.0).bytes_peak < 2 * scored.bytes_held
    for ask in ("generate", "log_likelihood"):
        dense = reader([], ids)
        getattr(dense, ask)(30 if ask == "generate" else [1] * 30)
        held = dense.cost(Flops.measured(model), 0.0)
        assert held.bytes_peak > held.bytes_held and held.kept == (40.0,) * LAYERS
        # Keys and values in float64 and columns, but nothing for tokens to come.
        assert held.bytes_held < 39 * (LAYERS * 2 * 2 * 8 * 8 + 16)
    # No hook stays behind.
    assert all(len(m._forward_pre_hooks) == 1 for m in model.model.layers)


@pytest.mark.parametrize("budget", [5, 0.25])
def test_what_evicts_at_a_prompts_end_is_shown_with_what_it_holds(budget):
    """Not with the bytes of the whole prompt: its end is behind all but the last token."""
    model, ids = tiny_model(), prompt(1, 23)
    evicted = kvprune.ComposedCache([AtTheEnd(budget)])
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=evicted)
    slots = evicted.columns(0).shape[-1]
    # 5.5 of 22 tokens are 6.
    assert slots == (5 if budget == 5 else 6)
    asked = reader([AtTheEnd(budget)], ids)
    asked.generate(3)
    cost, dense = (r.cost(Flops.measured(model), 0.0) for r in (asked, reader([], ids)))
    assert cost.bytes_held == evicted.nbytes < dense.bytes_held / 3
    assert cost.kept == (slots + 1.0,) * LAYERS


@given(st.integers(1, 60), st.integers(1, 1000))
@settings(max_examples=30)
def test_a_share_is_of_all_but_the_last_token(length, thousandths):
    """Of the whole prompt it would be the same, or one slot more."""
    share = thousandths / 1000
    asked = reader([StreamingLLM(0, share)], prompt(1, length))
    kept = asked.cost(Flops.measured(tiny_model()), 0.0).kept[0]
    lead = max(length - 1, 1)
    assert kept == min(max(int(Decimal(thousandths * lead) / 1000 + Decimal("0.5")), 1), length)
    whole = max(int(Decimal(thousandths * length) / 1000 + Decimal("0.5")), 1)
    assert whole - kept in (0, 1)


def test_kept_is_the_mean_over_heads():
    """Where the heads of a union hold different slots."""
    policies = [H2O(12, 2) | StreamingLLM(1, 12)]
    ids, cache = prompt(1, 40), kvprune.ComposedCache(policies)
    read_prompt(tiny_model(), cache, ids)
    counts = [(cache.columns(i)[0] >= 0).sum(-1).tolist() for i in range(LAYERS)]
    assert any(len(set(heads)) > 1 for heads in counts)
    kept = reader(policies, ids).cost(Flops.measured(tiny_model()), 0.0).kept
    assert kept == tuple(sum(heads) / len(heads) for heads in counts)


def test_a_layer_with_a_state_keeps_no_slots():
    """Which is not the same as none of them."""
    model: Any = attached_family("qwen3_next")
    cost = reader([H2O(3, 4)], prompt(1, 30), model).cost(Flops.measured(model), 0.0)
    assert cost.kept == (None, 7.0, None, 7.0) and cost.entered == (30,) * LAYERS


def test_a_reader_is_asked_once():
    """What was read before would count."""
    asked = reader([], prompt(1, 9))
    asked.generate(1)
    for ask in (asked.generate, asked.log_likelihood):
        with pytest.raises(KVPruneError, match="asked twice"):
            ask(1)  # type: ignore[arg-type]
    with pytest.raises(KVPruneError, match="at least one token"):
        Reading.of(tiny_model(), (), kvprune.ComposedCache())


# FLOPs.

COUNTED = [("llama", "sdpa"), ("llama", "eager"), ("mistral-window", "sdpa"), ("gpt_neox", "sdpa")]


@pytest.mark.parametrize(("family", "backend"), COUNTED)
@pytest.mark.parametrize("length", [1, 8, 200])
def test_flops_are_those_that_torch_counts(family, backend, length):
    """To the last one, where a kernel that it knows computes the attention."""
    model = tiny_model(family, backend=backend)
    flops, ids = Flops.measured(model), prompt(1, length)
    # The second drops one slot, which the last token takes.
    evicts, one = [StreamingLLM(2, 5)], [StreamingLLM(2, max(length - 4, 1))]
    twice: list[Any] = [KVzip(500, chunk=70, first=(1,) * 5, later=(2,))]
    plus: list[Any] = [sdtp_pruner(0.6), KVzip(500, plus=True, chunk=200)]
    pruned: list[Any] = [[sdtp_pruner(0.6)], [sdtp_pruner(0.6, 3), *evicts]]
    dense = 0.0
    # Of a prompt of one token the second reading is not counted.
    again = [twice, plus] if length > 1 else []
    for policies in ([], evicts, one, *pruned, *again):
        with counting() as counter:
            read_prompt(model, kvprune.ComposedCache(policies), ids)
        own = own_prefill_flops(model, ids[0].tolist(), policies)
        cost = reader(policies, ids, model).cost(flops, own)
        if policies in again:
            # Attention that votes goes block by block, without what is hidden; as H2O's it counts
            # as dense.
            assert cost.prefill_flops >= counter.get_total_flops() > 1.5 * dense
        else:
            assert cost.prefill_flops == counter.get_total_flops()
        dense = cost.prefill_flops if not policies else dense
        costly = any(isinstance(p, SDTP) for p in policies) or policies is plus
        assert (own > 0.0) == (length > 1 and costly)


def test_a_prompt_of_one_token_is_read_twice_too():
    """The token itself is the prompt then, and the slot that stays."""
    asked = reader([KVzip(5, sinks=0)], prompt(1, 1))
    assert asked.cache.columns(0).tolist() == [[[0]]]
    assert len(asked.log_likelihood([3, 4])) == 2


def test_h2o_costs_what_dense_costs():
    """Its own attention is not cheaper for being counted block by block, without what is hidden."""
    model, ids = tiny_model(), prompt(1, 200)
    flops = Flops.measured(model)
    costs = [reader(p, ids).cost(flops, 0.0).prefill_flops for p in ([], [H2O()])]
    # But for the last token, which attends to what is left of 199 and to itself.
    assert costs[0] - costs[1] == 159 * sum(flops.attention)
    with counting() as counter:
        read_prompt(model, kvprune.ComposedCache([H2O()]), ids)
    assert counter.get_total_flops() < costs[0]
    assert own_prefill_flops(model, ids[0].tolist(), [H2O()]) == 0.0


class Multiplies(H2O):
    """Computes something of its own: 2 * 3 * 4 * 5 FLOPs a layer."""

    def rank_slots(self, slots: kvprune.policy.SlotView) -> Ranking:
        """As H2O does."""
        torch.ones(3, 4) @ torch.ones(4, 5)
        return super().rank_slots(slots)


class Fails(H2O):
    """Raises in the middle of a forward."""

    def rank_slots(self, slots: kvprune.policy.SlotView) -> Ranking:
        """Not at all."""
        raise RuntimeError("no")


def test_what_a_policy_computes_is_counted_and_an_error_leaves_nothing():
    """In whichever hook; torch does not go on counting after an error."""
    model, ids = tiny_model(), prompt(1, 20)[0].tolist()
    # Of the prompt in each layer, of its last token once for all of them.
    assert own_prefill_flops(model, ids, [Multiplies()]) == 120 * (LAYERS + 1)
    # Each part of a union counts once.
    both = Multiplies() | Multiplies(recent=3)
    assert own_prefill_flops(model, ids, [both]) == 2 * 120 * 2 * LAYERS
    with pytest.raises(RuntimeError, match="no"):
        own_prefill_flops(model, ids, [Fails()])
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    assert not _get_current_dispatch_mode_stack()
    # Of the prompt in each layer, of its last token once for all of them.
    assert own_prefill_flops(model, ids, [Multiplies()]) == 120 * (LAYERS + 1)


@pytest.mark.parametrize(
    "policy", [StreamingLLM(2, 6, positions="cache"), ExpectedAttention(8)], ids=repr
)
def test_what_a_cache_reads_before_its_first_use_is_no_token_of_the_prompt(policy):
    """A new model's first cache tries how the model turns its keys."""
    model = kvprune.attach(fresh_model())
    lead = Reading.of(model, prompt(1, 20)[0].tolist(), kvprune.ComposedCache([policy]))
    assert lead.entered == [19] * LAYERS
