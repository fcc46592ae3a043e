"""Stock `generate` with a ComposedCache, against DynamicCache and against itself."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import kvprune
from kvprune.models.releases import chunks_begin_anew
from kvprune.policies import H2O, StreamingLLM

from ..support.models import (
    LAYERS,
    VOCAB,
    fresh_model,
    left_padded,
    plain_model,
    prompt,
    tiny_model,
)
from ..support.strategies import POLICIES, evicting, seeds

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beam search": {"num_beams": 3, "do_sample": False},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 5},
    "chunked beam search": {"num_beams": 2, "do_sample": False, "prefill_chunk_size": 7},
}


def generate(model, inputs, cache, seed=0, new=10, **options):
    """Scores and tokens of a generation with a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=new,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )


def assert_same(got, expected):
    """Tokens equal; logits within what float64 rounding explains."""
    assert torch.equal(got.sequences, expected.sequences)
    for mine, dense in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", [None, *POLICIES], ids=repr)
@pytest.mark.parametrize("padding", [0, 9])
def test_roomy_budgets_equal_dynamic_cache(mode, policy, padding):
    """Every mode that this release supports, with and without left padding."""
    inputs = left_padded(prompt(2, 23), [0, padding])
    policies = [policy.roomy()] if policy else []
    expected = generate(plain_model(), inputs, DynamicCache(), **MODES[mode])
    got = generate(tiny_model(), inputs, kvprune.ComposedCache(policies), **MODES[mode])
    assert_same(got, expected)


@pytest.mark.parametrize("policy", [None, *POLICIES], ids=repr)
@pytest.mark.parametrize("new_ids_alone", [False, True])
@pytest.mark.parametrize("padding", [0, 6])
def test_several_turns_equal_dynamic_cache(policy, new_ids_alone, padding):
    """All ids so far, or the new ones with a mask over all columns."""
    results = []
    for model, cache in (
        (plain_model(), DynamicCache()),
        (tiny_model(), kvprune.ComposedCache([policy.roomy()] if policy else [])),
    ):
        inputs = left_padded(prompt(2, 15), [0, padding])
        for turn in range(3):
            output = generate(model, inputs, cache, new=5, do_sample=False)
            said = torch.cat([output.sequences, prompt(2, 4, seed=turn)], 1)
            if new_ids_alone:
                # What is new to the cache: it has not seen the last generated token.
                columns = cache.get_seq_length() + 5
                new = said[:, -5:]
            else:
                columns, new = said.shape[1], said
            ones = torch.ones(2, columns - inputs["attention_mask"].shape[1], dtype=torch.long)
            mask = torch.cat([inputs["attention_mask"], ones], 1)
            results.append(output)
            inputs = {"input_ids": new, "attention_mask": mask}
    for expected, got in zip(results[:3], results[3:], strict=True):
        assert_same(got, expected)


@given(evicting, st.integers(2, 10), st.data(), seeds)
def test_beams_equal_the_same_tokens_decoded_alone(policy, budget, data, seed):
    """Kept sets follow their beam: the best beam's scores are those of its tokens, alone."""
    ids = prompt(1, data.draw(st.integers(2, 20)), seed)
    cache = kvprune.ComposedCache([policy.make(budget)])
    best = tiny_model().generate(
        ids,
        cache=cache,
        num_beams=3,
        max_new_tokens=8,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    transitions = tiny_model().compute_transition_scores(
        best.sequences, best.scores, best.beam_indices
    )
    alone = kvprune.ComposedCache([policy.make(budget)])
    with torch.no_grad():
        logits = [tiny_model()(ids, past_key_values=alone, logits_to_keep=1).logits[0, -1]]
        for token in best.sequences[0, ids.shape[1] : -1]:
            output = tiny_model()(token.view(1, 1), past_key_values=alone)
            logits.append(output.logits[0, -1])
    new = best.sequences[0, ids.shape[1] :]
    scores = torch.stack(logits).log_softmax(-1).gather(1, new[:, None])[:, 0]
    torch.testing.assert_close(transitions[0], scores.to(transitions.dtype), rtol=1e-5, atol=1e-5)


class Lengths(kvprune.TokenPolicy):
    """Notes the prompt lengths that it is shown."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def rank_slots(self, slots):
        """Keeps everything."""
        self.seen.add(tuple(slots.prompt_length.tolist()))


@given(
    st.sampled_from([H2O(0.2, 0.2), H2O(0.15, 0.1), StreamingLLM(2, 0.3)]),
    st.integers(4, 40),
    st.integers(1, 15),
    st.data(),
    seeds,
)
def test_a_share_is_the_same_whole_or_in_chunks(policy, length, chunk, data, seed):
    """`generate` tells the prompt's length beforehand, zeros inside the mask included."""
    inputs = left_padded(prompt(2, length, seed), [0, data.draw(st.integers(0, length - 1))])
    holes = data.draw(st.lists(st.integers(0, length - 2), max_size=3))
    inputs["attention_mask"][:, holes] = 0
    counts = []
    for options in ({}, {"prefill_chunk_size": chunk}):
        watch = Lengths()
        cache = kvprune.ComposedCache([policy, watch])
        generate(tiny_model(), inputs, cache, new=3, do_sample=False, **options)
        assert watch.seen == {tuple(inputs["attention_mask"].sum(-1).tolist())}
        counts.append([(cache.columns(i) >= 0).sum(-1).tolist() for i in range(LAYERS)])
        for layer in range(LAYERS):
            listed = set(cache.columns(layer).flatten().tolist())
            assert not listed & set(holes)
    # Which columns stay may differ, how many may not.
    assert counts[0] == counts[1]


def test_chunks_keep_the_budget_after_each_forward():
    """So that a prompt of any length runs in bounded memory."""
    held = []

    class Watch(kvprune.TokenPolicy):
        def rank_slots(self, slots):
            held.append(int((slots.columns >= 0).sum(-1).max()))

    cache = kvprune.ComposedCache([StreamingLLM(2, 6), Watch()])
    generate(tiny_model(), {"input_ids": prompt(2, 40)}, cache, prefill_chunk_size=10)
    assert max(held) == 8


def test_two_turns_count_both_prompts_once():
    """A share is of all prompts together, generated tokens left out, whole or in chunks."""
    for options in ({}, {"prefill_chunk_size": 3}):
        cache = kvprune.ComposedCache([H2O(0, 0.5)])
        inputs = left_padded(prompt(2, 20), [0, 4])
        output = generate(tiny_model(), inputs, cache, new=7, **options)
        said = torch.cat([output.sequences, prompt(2, 9)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 16, dtype=torch.long)], 1)
        second = {"input_ids": said, "attention_mask": mask}
        if options and chunks_begin_anew():
            with pytest.raises(kvprune.KVPruneError, match="counts chunks from 0"):
                generate(tiny_model(), second, cache, new=4, **options)
            options = {}
        generate(tiny_model(), second, cache, new=4, **options)
        # The last token of turn 1 had not been read: it comes in with the second prompt.
        expected = [[(20 + 10) // 2], [(16 + 10) // 2]]
        assert (cache.columns(0) >= 0).sum(-1)[:, :1].tolist() == expected


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("second", ["all ids", "new ids"])
def test_a_prompt_may_be_called_inputs(masked, second):
    """As `generate` itself calls its first argument."""
    model, ids = tiny_model(), prompt(1, 12)
    said: list[torch.Tensor] = []
    for name in ("input_ids", "inputs"):
        cache = kvprune.ComposedCache([H2O(3, 4)])
        mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
        first = model.generate(**{name: ids}, **mask, cache=cache, max_new_tokens=4)
        assert torch.equal(first[:, :12], ids)
        again = torch.cat([first, prompt(1, 3, 1)], 1)
        if second == "new ids":
            mask, again = {"attention_mask": torch.ones_like(again)}, again[:, cache.seen :]
        said.append(model.generate(**{name: again}, **mask, cache=cache, max_new_tokens=4))
    assert torch.equal(*said)


def test_tokens_come_out_in_plain_generate_without_kwargs():
    """The ten lines of the README, on a tiny model."""
    model = kvprune.attach(tiny_model())
    ids = prompt(1, 30)
    cache = kvprune.ComposedCache([H2O(4, 4)])
    tokens = model.generate(ids, cache=cache, max_new_tokens=5)
    assert tokens.shape == (1, 35) and int(tokens.max()) < VOCAB
    assert cache.seen == 34
    assert cache.columns(0).shape[-1] == 8


def test_inputs_embeds_equal_input_ids():
    """A prompt given as embeddings."""
    model, ids = tiny_model(), prompt(2, 20)
    embeds = model.get_input_embeddings()(ids).detach()
    tokens = [
        model.generate(**inputs, cache=kvprune.ComposedCache([H2O(0.2, 0.2)]), max_new_tokens=6)
        for inputs in ({"input_ids": ids}, {"inputs_embeds": embeds, "attention_mask": ids * 0 + 1})
    ]
    assert torch.equal(tokens[0][:, 20:], tokens[1])


@pytest.mark.parametrize("policy", [None, *POLICIES], ids=repr)
def test_a_later_mask_may_hide_what_was_seen(policy):
    """As a chat does with the padding that `generate` appends behind a row's eos token."""
    ids = prompt(2, 26)
    mask = left_padded(ids, [0, 6])["attention_mask"]
    later = mask.clone()
    later[1, 12:17] = 0
    logits = []
    for model, cache in (
        (plain_model(), DynamicCache()),
        (tiny_model(), kvprune.ComposedCache([policy.roomy()] if policy else [])),
    ):
        with torch.no_grad():
            for start, stop, now in ((0, 20, mask), (20, 23, later), (23, 24, later)):
                now = {"attention_mask": now[:, :stop], "past_key_values": cache}
                where = (now["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, start:]
                output = model(ids[:, start:stop], position_ids=where, **now)
                logits.append(output.logits[:, -1])
    torch.testing.assert_close(logits[3:], logits[:3], rtol=1e-9, atol=1e-10)
    if policy is None or policy.name != "sdtp":
        assert not set(range(12, 17)) & set(cache.columns(0)[1].flatten().tolist())


@pytest.mark.parametrize("policy", [StreamingLLM(1, 4), H2O(0, 5), H2O(2, 3)], ids=repr)
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_an_id_under_a_zero_of_the_mask_does_not_matter(policy, chunk):
    """Also where the padding takes a slot that was freed: chunks of one token."""
    ids, logits = prompt(1, 16), []
    mask = torch.ones_like(ids)
    mask[0, 10] = 0
    for token in (5, 6):
        ids[0, 10] = token
        cache = kvprune.ComposedCache([policy])
        inputs = {"input_ids": ids, "attention_mask": mask}
        out = generate(tiny_model(), inputs, cache, new=4, prefill_chunk_size=chunk)
        logits.append(torch.stack(out.logits))
    assert torch.equal(*logits)


def test_a_copy_made_inside_generate_is_in_none():
    """It can be gone on with by forwards, whose tokens count, and by `generate`."""
    model, cache, copies = tiny_model(), kvprune.ComposedCache([H2O(0.2, 0.2)]), []

    def copied(ids, scores):
        copies.append(copy.deepcopy(cache))
        return scores

    model.generate(prompt(1, 20), cache=cache, max_new_tokens=3, logits_processor=[copied])
    with torch.no_grad():
        model(prompt(1, 10), past_key_values=copies[0])
    assert copies[0].columns(0).shape[-1] == 12
    model.generate(prompt(1, 40), cache=copies[1], max_new_tokens=2)
    assert copies[1].seen == 41


def test_what_was_padding_stays_padding():
    """A later mask that hides a token, and shows the padding, does not move a row's first token."""
    model, ids = kvprune.attach(fresh_model()), prompt(1, 20)
    cache, mask = kvprune.ComposedCache([StreamingLLM(2, 4)]), torch.ones(1, 20, dtype=torch.long)
    with torch.no_grad():
        model(**left_padded(ids[:, :12], [3]), past_key_values=cache)
        mask[0, 10] = 0
        for i in range(12, 20):
            model(ids[:, i : i + 1], past_key_values=cache, attention_mask=mask[:, : i + 1])
    assert cache.columns(0).tolist() == [[[3, 4, 16, 17, 18, 19]]]
