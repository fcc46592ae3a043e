"""KVzip: what the second reading gives, what stays, and what is left of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune import ComposedCache, KVPruneError, Quantized
from kvprune.policies import H2O, SDTP, AdaKV, ChunkKV, FastKV, KVzip, SnapKV, StreamingLLM
from kvprune.statistics import Attention, SecondReading
from kvprune.testing import check

from ..models.test_stores import every_family
from ..support.family_models import StaysDouble, attached_family, linear_of
from ..support.models import LAYERS, fresh_model, left_padded, prompt, tiny_model
from ..support.oracles_reading import kvzip_kept
from ..support.strategies import chunked, sdtp_heads, seeds
from ..support.uneven import Threshold

TOLD: Any = {"first": (7, 8, 9), "later": (10, 11), "reply": (12,)}


def second_reading(
    model: Any, ids: list[int], reading: SecondReading
) -> list[list[list[dict[int, float]]]]:
    """The scores by layer and head: of each chunk, a stock forward of prompt and repeat together.

    Attention over all tokens is cut to what a query is held to, and made to add up to 1 again.
    """
    norm = reading.weighted
    config, size = model.config, len(ids)
    group = config.num_attention_heads // config.num_key_value_heads
    found: Any = [[{} for _ in range(config.num_key_value_heads)] for _ in range(LAYERS)]
    starts = range(0, size, reading.chunk)
    for start in starts:
        stop = min(start + reading.chunk, size)
        asked = list(reading.later) + ids[max(0, start - 8) : start] if start else reading.first
        repeat = [*asked, *reading.reply, *ids[start:stop]]
        whole = torch.tensor([ids + repeat])
        with torch.no_grad():
            out = model(whole, output_attentions=True, output_hidden_states=True, use_cache=True)
        for layer in range(LAYERS):
            values = out.past_key_values.layers[layer].values[0]
            weight = model.model.layers[layer].self_attn.o_proj.weight
            hidden = out.hidden_states[layer][0]
            for query_head in range(config.num_attention_heads):
                head = query_head // group
                mine = weight[:, query_head * values.shape[-1] :][:, : values.shape[-1]]
                for query in range(size, size + len(repeat)):
                    given_to = out.attentions[layer][0, query_head, query].double()
                    seen = {*range(reading.sinks), *range(start, stop), *range(size, query + 1)}
                    whole_sum = sum(float(given_to[t]) for t in seen)
                    for token in range(start, stop):
                        score = float(given_to[token]) / whole_sum
                        if norm:
                            written = float((mine @ values[head, token]).norm().detach())
                            score *= written / float(hidden[query].norm())
                        before = found[layer][head].get(token, 0.0)
                        found[layer][head][token] = max(before, score)
    return found


def kept_by_row(cache: ComposedCache, row: int, padding: int) -> list[list[set[int]]]:
    """The numbers of the tokens that a row keeps, by layer and head."""
    return [
        [
            {column - padding for column in head if column >= 0}
            for head in cache.columns(layer)[row].expand(slots.heads, -1).tolist()
        ]
        for layer, slots in cache.slot_layers()
    ]


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
def test_what_stays_is_the_oracle_s(family, heads, plus):
    """Rows with padding, in pieces, with chunks that do not divide the prompt: exact sets."""
    plain: Any = fresh_model(family, *heads, backend="eager")
    model: Any = tiny_model(family, heads=heads[0], kv_heads=heads[1])
    for seed, chunk, sinks in ((0, 9, 2), (1, 50, 4), (2, 5, 0)):
        ids, padding = prompt(2, 23, seed), [0, 6]
        policy = KVzip(7, plus, chunk, sinks, **TOLD)
        cache = ComposedCache([policy])
        kvprune.read(model, cache, **left_padded(ids, padding), chunk=8)
        (reading,) = policy.statistics
        for row, pad in enumerate(padding):
            scores = second_reading(plain, ids[row, pad:].tolist(), reading)
            expected = kvzip_kept(scores, 7, sinks)
            assert kept_by_row(cache, row, pad) == expected, (seed, row)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(("apart", "size"), [(True, 1), (True, 500), (False, 5), (False, 64)])
def test_without_padding_it_is_the_same(apart, size, plus, monkeypatch):
    """Where votes come out of the attention, and where they come apart; in blocks of any size."""
    monkeypatch.setattr("kvprune.engine.second_reading.on_gpu", lambda _: apart)
    monkeypatch.setattr("kvprune.attention.looks.CACHED", size)
    monkeypatch.setattr("kvprune.attention.blockwise.BLOCK", size)
    plain: Any = fresh_model(backend="eager")
    for seed, chunk, sinks in ((0, 9, 2), (1, 50, 4)):
        ids = prompt(1, 23, seed)
        policy = KVzip(7, plus, chunk, sinks, **TOLD)
        cache = ComposedCache([policy])
        kvprune.read(tiny_model(), cache, ids)
        (reading,) = policy.statistics
        with StaysDouble():
            scores = second_reading(plain, ids[0].tolist(), reading)
        assert kept_by_row(cache, 0, 0) == kvzip_kept(scores, 7, sinks)
        # And the numbers themselves: they are all probabilities, or all weighted.
        for layer, slots in cache.slot_layers():
            held = slots.statistics[reading][0]
            columns = slots.columns[0].expand(slots.heads, -1)
            for head in range(slots.heads):
                for column, score in zip(columns[head].tolist(), held[head].tolist(), strict=True):
                    if column >= 0:
                        assert score == pytest.approx(scores[layer][head][column], rel=1e-9)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gemma2", "gpt_oss", "jetmoe"])
def test_votes_in_one_pass_and_apart(family, plus, monkeypatch):
    """By the model's own rule, with heads that share a latent, and in rows with padding."""
    if family == "jetmoe" and plus:
        pytest.skip("has no projection that is known")
    inputs: Any = left_padded(prompt(2, 26, 3), [0, 7])
    monkeypatch.setattr("kvprune.attention.blockwise.BLOCK", 7)
    policy, found = KVzip(500, plus, 11, 1, **TOLD), []
    with StaysDouble():
        for apart in (False, True):
            monkeypatch.setattr(
                "kvprune.engine.second_reading.on_gpu", lambda _, apart=apart: apart
            )
            cache = ComposedCache([policy])
            kvprune.read(attached_family(family), cache, **inputs)
            found.append([s.statistics[policy.statistics[0]] for _, s in cache.slot_layers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("store", [None, Quantized(8, 4)], ids=repr)
@given(st.integers(5, 20), st.data(), seeds)
def test_a_second_reading_leaves_votes_alone(store, length, data, seed):
    """Columns, keys, values and other statistics are those of a reading without it."""
    pieces = data.draw(chunked(length))
    inputs: Any = left_padded(prompt(2, length, seed), [0, data.draw(st.integers(0, 3))])
    before: Any = [Threshold(0.2, recent=2)] if data.draw(st.booleans()) else []
    once = ComposedCache(before, observe=(Attention(),), store=store)
    twice = ComposedCache([*before, KVzip(500, chunk=6)], observe=(Attention(),), store=store)
    model = tiny_model()
    logits = [kvprune.read(model, c, **inputs, chunk=max(pieces)) for c in (once, twice)]
    assert torch.equal(*logits)
    assert once.seen == twice.seen
    for (_, one), (_, two) in zip(once.slot_layers(), twice.slot_layers(), strict=True):
        assert held_by(one) == held_by(two)


def held_by(slots: Any) -> list[dict[int, Any]]:
    """By row and head, what is held of each column: key, value and received attention."""
    columns = slots.columns.expand(-1, slots.heads, -1)
    rest = slots.keys, slots.values, slots.statistics[Attention()]
    lanes = zip(columns.flatten(0, 1), *(t.flatten(0, 1) for t in rest), strict=True)
    return [
        {
            c: (key.tolist(), value.tolist(), float(got))
            for c, key, value, got in zip(at.tolist(), *each, strict=True)
            if c >= 0
        }
        for at, *each in lanes
    ]


def test_the_invariants_hold():
    """All of `kvprune.testing`'s, alone and in pipelines, in caches that part at once too."""
    small, plus = KVzip(6, sinks=1, chunk=5, **TOLD), KVzip(0.4, plus=True, sinks=0)
    check(small, roomy=KVzip(500), examples=1)
    check(plus, roomy=KVzip(500, plus=True, chunk=3), examples=1, seed=1)
    check([SnapKV(9, window=2), small, H2O(3, 3)], examples=1, seed=2)


BESIDE: dict[str, list[Any]] = {
    "SDTP before": [SDTP(sdtp_heads(), 0.6, 2, 3, 6), KVzip(0.5, sinks=1)],
    "SDTP behind": [KVzip(0.5, sinks=1), SDTP(sdtp_heads(), 0.6, 2, 3, 6)],
    "StreamingLLM inside": [KVzip(9), StreamingLLM(2, 8, positions="cache")],
    "H2O": [KVzip(9), H2O(3, 3)],
    "AdaKV": [AdaKV(SnapKV(9, window=3)), KVzip(6)],
    "chunks of it": [ChunkKV(KVzip(9), size=3)],
    "some layers": [KVzip(6, layers=(1, 2))],
    "two of them": [KVzip(12, chunk=7), KVzip(8, plus=True)],
}


def ask(family: str, policies: list[Any]) -> None:
    """A document is read once, and each question is asked of a copy; each row as it is alone."""
    model: Any = attached_family(family)
    ids, padding = prompt(2, 26, 3), [0, 7]
    inputs: Any = left_padded(ids, padding)
    cache, alone = ComposedCache(policies), ComposedCache(policies)
    kvprune.read(model, cache, **inputs)
    kvprune.read(model, alone, ids[1:, 7:])
    assert kept_by_row(cache, 1, 7) == kept_by_row(alone, 0, 0)
    for seed in (4, 5):
        asked = torch.cat([inputs["input_ids"], prompt(2, 5, seed)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
        options: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        copied = copy.deepcopy(cache)
        out = model.generate(asked, attention_mask=mask, cache=copied, **options)
        lone = model.generate(asked[1:, 7:], cache=copy.deepcopy(alone), **options)
        assert out[1, 7:].tolist() == lone[0].tolist()
        assert copied.seen == asked.shape[1] + 3


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_beside_others(family, name):
    """Whatever prunes or evicts before it, behind it or around it."""
    with StaysDouble():
        ask(family, BESIDE[name])


@pytest.mark.parametrize("plus", [False, True])
@every_family
def test_every_family(family: str, plus: bool):
    """Also where heads share a latent, where a model attends by itself, and where windows slide."""
    with StaysDouble():
        if linear_of(family):
            with pytest.raises(KVPruneError, match="linear-attention layers cannot follow"):
                ask(family, [KVzip(9, plus, 11, 1, **TOLD)])
            return
        if family == "jetmoe" and plus:
            with pytest.raises(KVPruneError, match="output_weight"):
                ask(family, [KVzip(9, plus, 11, 1, **TOLD)])
            return
        ask(family, [KVzip(9, plus, 11, 1, **TOLD)])


@pytest.mark.parametrize("budget", [0.4, 12])
def test_a_later_prompt_may_be_read_twice_as_well(budget):
    """The budget is of what was repeated; what was generated stays beside it, however much."""
    model: Any = tiny_model()
    ids = prompt(1, 40, 6)
    cache = ComposedCache([KVzip(budget, sinks=2)])
    kvprune.read(model, cache, ids[:, :20])
    assert held(cache) == (8 if budget == 0.4 else 12) * 2 * LAYERS
    model.generate(ids[:, :21], cache=cache, max_new_tokens=30, do_sample=False, pad_token_id=0)
    seen = cache.seen
    kvprune.read(model, cache, prompt(1, 15, 7))
    # 20 and 1 and 15 tokens of prompts; the one in the middle was not repeated.
    kept = round(0.4 * 36) if budget == 0.4 else 12
    assert held(cache) == (kept + seen - 20) * 2 * LAYERS
    generated = set(range(20, seen))
    for layer in range(LAYERS):
        for head in cache.columns(layer)[0].tolist():
            assert generated <= set(head)
    columns = [cache.columns(layer).flatten() for layer in range(LAYERS)]
    assert int(torch.cat(columns).amax()) >= seen, "some of the new prompt"


def held(cache: ComposedCache) -> int:
    """The slots of all layers and heads."""
    layers = cache.slot_layers()
    return sum(int((s.columns >= 0).expand(-1, s.heads, -1).sum()) for _, s in layers)


def test_memory_follows_what_is_kept():
    """A quarter of the slots has a quarter of the bytes, with the slack of each rectangle."""
    model: Any = tiny_model()
    ids = prompt(1, 400, 8)
    dense, cache = ComposedCache(), ComposedCache([KVzip(0.25, chunk=50)])
    kvprune.read(model, dense, ids)
    kvprune.read(model, cache, ids)
    slots = sum(int((cache.columns(layer) >= 0).sum()) for layer in range(LAYERS))
    assert slots == 100 * 2 * LAYERS
    size = dense.nbytes / 400 / LAYERS / 2
    # A column of its own for each head, and the statistic.
    assert cache.nbytes <= slots * (size + 8 + 8) * 1.05 + 9 * LAYERS * 2 * (size + 16)


def test_what_is_refused_changes_nothing():
    """Before anything is read, with the way out."""
    model: Any = tiny_model()
    ids = prompt(1, 20)
    cache = ComposedCache([KVzip(6)])
    with pytest.raises(KVPruneError, match=r"kvprune\.read\(model, cache, document_ids\)"):
        model.generate(ids, cache=cache, max_new_tokens=2)
    with pytest.raises(KVPruneError, match=r"kvprune\.read"):
        model(ids, past_key_values=cache)
    assert cache.seen == 0
    kvprune.read(model, cache, ids)
    assert cache.seen == 20
    short: Any = kvprune.attach(fresh_model(max_position_embeddings=64))
    long = prompt(1, 40)
    cache = ComposedCache([KVzip(6)])
    with pytest.raises(KVPruneError, match="expected at most 64 together"):
        kvprune.read(short, cache, long)
    assert cache.seen == 0
    kvprune.read(short, ComposedCache([KVzip(6, chunk=10)]), long)
    for options, match in (
        ({"chunk": 0}, "chunk=0"),
        ({"sinks": -1}, "sinks=-1"),
        ({"when": None}, "when=None"),
        ({"when": 5}, "when=5"),
        ({"plus": 1}, "plus=1"),
        ({"first": [1]}, "first="),
        ({"reply": ("a",)}, "reply="),
        ({"budget": 4}, "more tokens than sinks"),
    ):
        with pytest.raises(KVPruneError, match=match):
            KVzip(**options)
    with pytest.raises(KVPruneError, match="linear-attention"):
        kvprune.read(attached_family("qwen3_next"), ComposedCache([KVzip(6)]), ids)


def test_an_error_in_a_second_reading_asks_for_a_reset():
    """As any error in a forward; after `reset()` the cache is as new."""
    model: Any = kvprune.attach(fresh_model())
    ids = prompt(1, 20)
    cache = ComposedCache([KVzip(6)])
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("as planned")

    hook = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="as planned"):
        kvprune.read(model, cache, ids)
    hook.remove()
    with pytest.raises(KVPruneError, match="reset"):
        model(ids[:, :1], past_key_values=cache)
    cache.reset()
    fresh = ComposedCache([KVzip(6)])
    assert torch.equal(kvprune.read(model, cache, ids), kvprune.read(model, fresh, ids))
    assert torch.equal(cache.columns(1), fresh.columns(1))


def test_instructions_are_those_of_the_paper_in_a_chat_s_form():
    """The texts, and the reply's beginning out of the chat template."""

    class Tokenizer:
        chat_template = "given"

        def decode(self, ids: list[int]) -> str:
            return text(tuple(ids))

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [ord(letter) for letter in text]

        def apply_chat_template(self, chat: Any, **_: Any) -> str:
            return f"<u>{chat[0]['content']}</u><a>"

    def text(ids: tuple[int, ...]) -> str:
        return "".join(map(chr, ids))

    policy: Any = KVzip(0.3, plus=True).for_tokenizer(Tokenizer())
    assert policy.budget == 0.3 and policy.plus
    assert text(policy.first) == "\n\nRepeat the previous context exactly."
    assert text(policy.later).endswith("exactly, starting with")
    assert text(policy.reply) == "</u><a>"
    bare: Any = Tokenizer()
    bare.chat_template = None
    around: Any = ChunkKV(KVzip(first=(1, 2)) | KVzip(0.5)).for_tokenizer(bare)
    one, two = around.base.parts
    assert text(one.reply) == "\n" and one.first == (1, 2)
    assert two.first == policy.first


def test_repeats_are_chunks_behind_an_instruction():
    """The last eight tokens of the chunk before stand in front of a later one."""
    reading = SecondReading(10, **TOLD)
    ids = list(range(100, 125))
    assert reading.repeats(ids) == [
        ([7, 8, 9, 12, *ids[:10]], 0, 10),
        ([10, 11, *ids[2:10], 12, *ids[10:20]], 10, 20),
        ([10, 11, *ids[12:20], 12, *ids[20:]], 20, 25),
    ]
    assert SecondReading(10).repeats([]) == []


class Largest(SecondReading):
    """A statistic of one's own: the sum over the queries instead of the most."""

    def votes(self, new):
        """See `SecondReading.votes`."""
        return new.probabilities.sum((2, 3))

    def merged(self, one, other):
        """See `SecondReading.merged`."""
        return one + other


def test_a_statistic_of_one_s_own():
    """It derives from SecondReading; its policy is asked behind the second reading alone."""

    class Sums(kvprune.TokenPolicy):
        statistics = (Largest(chunk=50),)

        def rank_slots(self, slots):
            """See `TokenPolicy.rank_slots`."""
            score = slots.statistic(Largest(chunk=50))
            return kvprune.Ranking(score, torch.zeros_like(slots.valid), slots.tokens(5))

    cache = ComposedCache([Sums()])
    kvprune.read(tiny_model(), cache, prompt(2, 20))
    assert cache.columns(0).shape[-1] == 5
    totals = cache.layers[0].statistics[Largest(chunk=50)]
    assert bool((totals > 1).any()), "more than a probability"


def test_what_is_observed_serves_budgets_later():
    """One reading, twice; `with_policies` then is a cache that had the policy."""
    ids = prompt(2, 30, 9)
    for policy in (KVzip(8, sinks=1), KVzip(5, sinks=1)):
        lead = ComposedCache(observe=policy.statistics)
        kvprune.read(tiny_model(), lead, ids)
        mine, expected = lead.with_policies([policy], tiny_model()), ComposedCache([policy])
        kvprune.read(tiny_model(), expected, ids)
        for layer in range(LAYERS):
            assert torch.equal(mine.columns(layer), expected.columns(layer))
    with pytest.raises(KVPruneError, match=r"kvprune\.read"):
        tiny_model()(ids, past_key_values=ComposedCache(observe=(SecondReading(),)))


def test_layers_that_hold_nothing_of_a_chunk():
    """Where pruning has left nothing of it, and no sinks."""
    for pruner in (FastKV(0.2, layer=2, window=3), SDTP(sdtp_heads(), 0.2, 2, 3, 6, min_tokens=1)):
        cache = ComposedCache([pruner, KVzip(0.5, plus=True, chunk=6, sinks=0)])
        kvprune.read(tiny_model(), cache, prompt(1, 60))
        assert all(cache.columns(layer).shape[-1] for layer in range(LAYERS))


def test_the_first_prompt_alone():
    """With `when="first"` a later one is read once."""
    model: Any = kvprune.attach(fresh_model())
    forwards = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    cache = ComposedCache([KVzip(6, when="first")])
    kvprune.read(model, cache, prompt(1, 20))
    assert len(forwards) == 2
    kvprune.read(model, cache, prompt(1, 9, 1))
    assert len(forwards) == 3
    hook.remove()


@pytest.mark.parametrize("stage", ["behind the layers", "between chunks"])
def test_an_error_between_the_readings(stage, monkeypatch):
    """Policies were not asked, so that the cache has to begin anew; nothing waits."""
    model: Any = kvprune.attach(fresh_model())
    cache = ComposedCache([SnapKV(9, window=3), KVzip(6, chunk=7)])
    calls = []

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) == (1 if stage == "behind the layers" else 2):
            raise KeyboardInterrupt

    at = model.lm_head if stage == "behind the layers" else model
    hook = at.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        kvprune.read(model, cache, prompt(1, 20), chunk=10 if stage == "between chunks" else None)
    hook.remove()
    assert cache.state.waiting is None
    with pytest.raises(KVPruneError, match="reset"):
        model(prompt(1, 1), past_key_values=cache)
    cache.reset()
    kvprune.read(model, cache, prompt(1, 20))


def test_activations_that_are_not_finite():
    """The row is told of, and the others are as they are alone."""
    model: Any = kvprune.attach(fresh_model())
    ids = prompt(2, 20)
    ids[0, 7] = 1
    with torch.no_grad():
        model.model.embed_tokens.weight[1] = torch.inf
    for plus in (False, True):
        cache, alone = ComposedCache([KVzip(6, plus)]), ComposedCache([KVzip(6, plus)])
        with pytest.warns(RuntimeWarning, match=r"not finite .* rows \[0\]"):
            kvprune.read(model, cache, ids)
        kvprune.read(model, alone, ids[1:])
        assert kept_by_row(cache, 1, 0) == kept_by_row(alone, 0, 0)


def test_a_repeat_that_cannot_be():
    """Words of another vocabulary, and chunks beyond the prompt: before anything is read."""

    class Wrong(SecondReading):
        def repeats(self, ids):
            return [(list(ids), 0, len(ids) + 1)]

    class Policy(kvprune.TokenPolicy):
        statistics = (Wrong(),)

        def rank_slots(self, slots):
            return None

    for policy, match in ((KVzip(6, first=(999,)), "token 999"), (Policy(), "repeats")):
        cache = ComposedCache([policy])
        with pytest.raises(KVPruneError, match=match):
            kvprune.read(tiny_model(), cache, prompt(1, 20))
        assert cache.seen == 0 and not cache.guard.failure
    with pytest.raises(KVPruneError, match="expected the model's tokenizer"):
        KVzip().for_tokenizer("gpt2")
