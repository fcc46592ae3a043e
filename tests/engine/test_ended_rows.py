"""Rows that end, or pause, while others go on: a row is always what it is alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
)

import kvprune
from kvprune.policies import H2O, SDTP, StreamingLLM

from ..support.family_models import StaysDouble, attached_family
from ..support.models import (
    LAYERS,
    fresh_model,
    left_padded,
    plain_model,
    positions,
    prompt,
    tiny_model,
)
from ..support.opcount import OpCount
from ..support.strategies import sdtp_heads

EOS, PAD, START, TURN = 1, 0, 20, 14
POLICIES: dict[str, list[kvprune.TokenPolicy]] = {
    "dense": [],
    "H2O": [H2O(4, 4)],
    "H2O, shares": [H2O(0.2, 0.2)],
    "H2O, positions": [H2O(4, 4, positions="cache")],
    "StreamingLLM": [StreamingLLM(2, 6)],
    "StreamingLLM, positions": [StreamingLLM(2, 6, positions="cache")],
    "union": [H2O(2, 3) | StreamingLLM(2, 4)],
    "pruned": [SDTP(sdtp_heads(), 0.6, min_tokens=4), H2O(4, 4)],
}
each_policy = pytest.mark.parametrize("policies", POLICIES.values(), ids=POLICIES)


class Say(LogitsProcessor):
    """Has rows say these very words `[B, n]` behind the first `start` ids."""

    def __init__(self, words: Tensor, start: int) -> None:
        self.words, self.start = words, start

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[B, V]`."""
        said = self.words[: len(ids), ids.shape[1] - self.start, None]
        return torch.full_like(scores, -1e9).scatter(1, said, 0.0)


class AtWord(StoppingCriteria):
    """Ends a row behind a word that is no eos, as stop strings do."""

    def __init__(self, word: int) -> None:
        self.word = word

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """`[B]` bool."""
        return ids[:, -1] == self.word


HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "chunks": {"prefill_chunk_size": 7},
    "pad is eos": {"pad_token_id": EOS},
    "a word": {"stopping_criteria": [AtWord(5)]},
    "a criterion's eos": {
        "eos_token_id": None,
        "stopping_criteria": [EosTokenCriteria(EOS)],
    },
}


def conversation(end: int) -> tuple[Tensor, Tensor, Tensor]:
    """A prompt, an answer in which row 0 ends after four tokens, and what is said next."""
    ids, answer, more = prompt(2, START), prompt(2, TURN, 1) % 50 + 8, prompt(2, 6, 2)
    answer[0, 3] = end
    return ids, answer, more


def said(model: Any, ids: Tensor, answer: Tensor, cache: Any, **how: Any) -> Tensor:
    """The prompt and the answer."""
    words = LogitsProcessorList([Say(answer, ids.shape[1])])
    how = {"max_new_tokens": TURN, "logits_processor": words, **how}
    found: Tensor = model.generate(ids, cache=cache, **how)
    return found


def turn(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> list[Tensor]:
    """Logits of three more tokens, all rows saying the same."""
    words = LogitsProcessorList([Say(prompt(1, 3, 9).expand(2, -1), ids.shape[1])])
    out = model.generate(
        ids,
        attention_mask=mask,
        cache=cache,
        max_new_tokens=3,
        logits_processor=words,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found: list[Tensor] = list(out.logits)
    return found


def kept(cache: kvprune.ComposedCache, row: int, hidden: list[int]) -> list[list[list[int]]]:
    """A row's columns by layer and head, counted without those that are `hidden` in it."""

    def number(column: int) -> int:
        assert column not in hidden
        return column - sum(h < column for h in hidden)

    return [
        [[number(int(c)) for c in head if c >= 0] for head in cache.columns(layer)[row]]
        for layer in range(LAYERS)
    ]


@each_policy
@pytest.mark.parametrize(
    "how",
    # The others are made of the same.
    [pytest.param(h, marks=[pytest.mark.slow] * (h in ("sampling", "a word"))) for h in HOW],
)
@pytest.mark.parametrize("new_ids_alone", [False, True])
def test_a_row_that_ended_early_is_as_alone(policies, how, new_ids_alone):
    """Behind its eos `generate` appends padding, which is none of its tokens."""
    model, options = tiny_model(eos_token_id=EOS), HOW[how]
    ids, answer, more = conversation(5 if how == "a word" else EOS)
    batch, alone = (kvprune.ComposedCache(policies) for _ in "ab")
    both = said(model, ids, answer, batch, **options)
    one = said(model, ids[:1], answer, alone, **options)
    pads = list(range(START + 4, START + TURN))
    assert (both[0, START + 4 :] == options.get("pad_token_id", PAD)).all()
    assert torch.equal(one[0], both[0, : START + 4])
    with torch.no_grad():
        # In the batch it was read.
        model(one[:, -1:], past_key_values=alone)
    assert kept(batch, 0, pads) == kept(alone, 0, [])
    mask = torch.ones(2, START + TURN + 6, dtype=torch.long)
    mask[0, pads] = 0
    everything, single = torch.cat([both, more], 1), torch.cat([one, more[:1]], 1)
    begin = (batch.seen, alone.seen) if new_ids_alone else (0, 0)
    got = turn(model, everything[:, begin[0] :], mask, batch)
    expected = turn(model, single[:, begin[1] :], torch.ones_like(single), alone)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine[:1], theirs, rtol=1e-9, atol=1e-10)
    assert kept(batch, 0, pads) == kept(alone, 0, [])


@each_policy
def test_the_row_that_goes_on_is_as_alone(policies):
    """A row that has ended gives no slot up, nor does it keep others from theirs."""
    model, (ids, answer, _) = tiny_model(eos_token_id=EOS), conversation(EOS)
    batch, alone = (kvprune.ComposedCache(policies) for _ in "ab")
    options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    both: Any = said(model, ids, answer, batch, **options)
    one: Any = said(model, ids[1:], answer[1:], alone, **options)
    for mine, theirs in zip(both.logits, one.logits, strict=True):
        torch.testing.assert_close(mine[1:], theirs, rtol=1e-9, atol=1e-10)
    assert kept(batch, 1, []) == kept(alone, 0, [])


def test_several_sequences_of_one_prompt_end_by_themselves():
    """With `num_return_sequences`, too."""
    model, (ids, answer, _) = tiny_model(eos_token_id=EOS), conversation(EOS)
    batch, alone = (kvprune.ComposedCache([StreamingLLM(2, 6)]) for _ in "ab")
    said(model, ids[:1], answer, batch, num_return_sequences=2, do_sample=True)
    one = said(model, ids[:1], answer, alone)
    model(one[:, -1:], past_key_values=alone)
    assert kept(batch, 0, list(range(START + 4, START + TURN))) == kept(alone, 0, [])


def test_where_no_row_has_ended_yet_a_step_costs_the_same():
    """Operators of each forward: as many as where no row can end."""
    found = list[list[int]]()
    for eos in (None, EOS):
        model, counts = kvprune.attach(fresh_model(eos_token_id=eos)), list[OpCount]()

        def before(*_: Any, counts: list[OpCount] = counts) -> None:
            counts.append(OpCount())
            counts[-1].__enter__()

        def after(*_: Any, counts: list[OpCount] = counts) -> None:
            counts[-1].__exit__(None, None, None)

        model.register_forward_pre_hook(before, prepend=True)
        model.register_forward_hook(after)
        ids, answer, _ = conversation(7)
        said(model, ids, answer, kvprune.ComposedCache([H2O(4, 4)]))
        found.append([ops.calls.total() for ops in counts])
    assert found[0] == found[1] and len(found[0]) == TURN


def test_a_token_that_looks_like_padding_is_a_token():
    """Before a row has ended, a model may say the id of padding."""
    model, (ids, answer, _) = tiny_model(eos_token_id=EOS), conversation(EOS)
    answer[:, 1] = PAD
    cache = kvprune.ComposedCache()
    said(model, ids, answer, cache)
    assert kept(cache, 0, [])[0][0] == list(range(START + 4))


def test_without_eos_nothing_is_padding():
    """A row that a criterion ends goes on with tokens of its own, as `generate` has it."""
    model, (ids, answer, _) = tiny_model(), conversation(5)
    cache = kvprune.ComposedCache()
    said(model, ids, answer, cache, stopping_criteria=[AtWord(5)])
    assert kept(cache, 0, []) == [[list(range(START + TURN - 1))]] * LAYERS


# Turns in which nothing is asked of a row.


@each_policy
def test_a_row_of_which_nothing_is_asked_says_padding_and_stays(policies):
    """Its ids end in padding, as an answer that ended early does; the next turn is its own."""
    model, (ids, answer, more) = tiny_model(eos_token_id=EOS), conversation(EOS)
    batch, alone = (kvprune.ComposedCache(policies) for _ in "ab")
    both, one = said(model, ids, answer, batch), said(model, ids[:1], answer, alone)
    model(one[:, -1:], past_key_values=alone)
    second, mask = torch.cat([both, more], 1), torch.ones(2, START + TURN + 6, dtype=torch.long)
    second[0, START + TURN :], mask[0, START + 4 :] = PAD, 0
    words = LogitsProcessorList([Say(more, second.shape[1])])
    how: dict[str, Any] = {"max_new_tokens": 5, "logits_processor": words}
    both = model.generate(second, attention_mask=mask, cache=batch, **how)
    assert (both[0, START + 4 :] == PAD).all() and (both[1, -5:] == more[1, :5]).all()
    pads = list(range(START + 4, both.shape[1]))
    assert kept(batch, 0, pads) == kept(alone, 0, [])
    mask = torch.ones(2, both.shape[1] + 6, dtype=torch.long)
    mask[0, pads] = 0
    got = turn(model, torch.cat([both, more], 1), mask, batch)
    single = torch.cat([one, more[:1]], 1)
    expected = turn(model, single, torch.ones_like(single), alone)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine[:1], theirs, rtol=1e-9, atol=1e-10)


def test_beside_a_row_that_rests_a_row_without_eos_goes_on():
    """A criterion ends it; `generate` appends nothing then, and a 0 that it says is a token."""
    model, cache = tiny_model(eos_token_id=EOS), kvprune.ComposedCache()
    # A third row goes on to the end, as the second would.
    ids, answer, more = (t[[0, 1, 1]] for t in conversation(EOS))
    all_rows = said(model, ids, answer, cache)
    second, mask = torch.cat([all_rows, more], 1), torch.ones(3, START + TURN + 6, dtype=torch.long)
    second[0, START + TURN :], mask[0, START + 4 :] = PAD, 0
    more[1, :4] = torch.tensor([5, PAD, 9, PAD])
    more[2, :4] = 9
    words = LogitsProcessorList([Say(more, second.shape[1])])
    how: dict[str, Any] = {"max_new_tokens": 5, "logits_processor": words, "eos_token_id": None}
    model.generate(second, attention_mask=mask, cache=cache, stopping_criteria=[AtWord(5)], **how)
    assert kept(cache, 1, []) == [[list(range(cache.seen))]] * LAYERS


@pytest.mark.parametrize("masked", [True, False])
def test_an_answer_that_was_cut_short_is_gone_on_with(masked):
    """All ids again and nothing new: one row has ended, the other is where it was."""
    model, (ids, answer, _) = tiny_model(eos_token_id=EOS), conversation(EOS)
    cache, dense = kvprune.ComposedCache(), DynamicCache()
    both = said(model, ids, answer, cache)
    mask = torch.ones_like(both)
    mask[0, START + 4 :] = 0
    how: dict[str, Any] = {"max_new_tokens": 4, "output_logits": True}
    how |= {"return_dict_in_generate": True}
    how |= {"attention_mask": mask} if masked else {}
    got = model.generate(both, cache=cache, **how)
    expected = plain_model().generate(both[1:], past_key_values=dense, **how | {
        "attention_mask": mask[1:], "pad_token_id": PAD})  # fmt: skip
    assert (got.sequences[0, START + 4 :] == PAD).all()
    assert torch.equal(got.sequences[1:], expected.sequences)


@pytest.mark.parametrize(
    "how", [{"num_beams": 2}, {"pad_token_id": None, "eos_token_id": None}], ids=str
)
def test_where_generate_cannot_pad_rows_that_ended_are_refused(how):
    """Beams, and without any id of padding."""
    model = kvprune.attach(fresh_model(pad_token_id=None))
    cache, ids = kvprune.ComposedCache(), prompt(2, 12)
    model(ids[:, :9], past_key_values=cache)
    if "num_beams" in how:
        cache.batch_repeat_interleave(2)
        how = {**how, "pad_token_id": PAD}
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    with pytest.raises(kvprune.KVPruneError, match=r"on the right, or empty, in rows \[0"):
        model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=2, **how)
    assert cache.seen == 9


# Loops of one's own.


def loop(
    model: Any, ids: Tensor, mask: Tensor, sizes: list[int], policies: list[kvprune.TokenPolicy]
) -> tuple[Tensor, kvprune.ComposedCache]:
    """Logits of all forwards `[B, n, V]`, and the cache."""
    cache, start, logits = kvprune.ComposedCache(policies), 0, []
    where = positions(mask)
    for size in sizes:
        new = slice(start, start + size)
        start += size
        now = {"attention_mask": mask[:, :start], "position_ids": where[:, new]}
        with torch.no_grad():
            out = model(ids[:, new], past_key_values=cache, **now)
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


def alone(
    model: Any, ids: Tensor, mask: Tensor, sizes: list[int], policies: list[kvprune.TokenPolicy]
) -> tuple[list[Tensor], kvprune.ComposedCache]:
    """One row `[n]` without its padding: logits of each forward that brings it something."""
    cache, start, logits = kvprune.ComposedCache(policies), 0, []
    for size in sizes:
        new = slice(start, start + size)
        start += size
        mine = ids[new][mask[new].bool()]
        if len(mine):
            with torch.no_grad():
                logits.append(model(mine[None], past_key_values=cache).logits[0])
    return logits, cache


SIZES = [12, 1, 1, 1, 7, 1, 1, 9, 1]
PAUSES = torch.ones(2, sum(SIZES), dtype=torch.long)
PAUSES[0, 13:17] = 0  # rests, and a turn begins with padding
PAUSES[1, 17:20] = 0  # a turn ends in padding
PAUSES[0, 20] = PAUSES[1, 20] = 0  # both rest
PAUSES[0, 22:31] = 0  # a whole turn passes by
PAUSES[1, 29:] = 0  # a turn ends in padding, and then it is over


@each_policy
def test_a_row_may_pause_in_a_loop_of_ones_own(policies):
    """Padding anywhere behind its tokens: logits and kept slots are those of the row alone."""
    model, ids = tiny_model(), prompt(2, sum(SIZES))
    logits, cache = loop(model, ids, PAUSES, SIZES, policies)
    for row in range(2):
        expected, one = alone(model, ids[row], PAUSES[row], SIZES, policies)
        hidden = (PAUSES[row] == 0).nonzero().flatten().tolist()
        assert kept(cache, row, hidden) == kept(one, 0, [])
        got, ends = logits[row][PAUSES[row].bool()], torch.tensor([len(e) for e in expected])
        # Each forward's last token: pruning says nothing of the others.
        last = ends.cumsum(0) - 1
        there = torch.stack([e[-1] for e in expected])
        torch.testing.assert_close(got[last], there, rtol=1e-9, atol=1e-10)


def test_pausing_equals_a_dense_cache():
    """Which takes such a mask as it comes."""
    ids = prompt(2, sum(SIZES))
    got, _ = loop(tiny_model(), ids, PAUSES, SIZES, [])
    dense, start, expected = DynamicCache(), 0, []
    for size in SIZES:
        new = slice(start, start + size)
        start += size
        now = {"attention_mask": PAUSES[:, :start], "position_ids": positions(PAUSES)[:, new]}
        with torch.no_grad():
            expected.append(plain_model()(ids[:, new], past_key_values=dense, **now).logits)
    there = PAUSES.bool()
    torch.testing.assert_close(got[there], torch.cat(expected, 1)[there], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_the_last_tokens_before_padding_are_not_pruned(asked):
    """Also where padding is behind them: these are the ones whose logits are read."""
    policy = SDTP(sdtp_heads(), 0.3, min_tokens=4)
    ids, sizes = prompt(2, 24), (6, 18)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, 20:] = 0
    model, cache = tiny_model(), kvprune.ComposedCache([policy])
    with torch.no_grad():
        model(ids[:, : sizes[0]], past_key_values=cache)
        model(ids[:, 6:], past_key_values=cache, attention_mask=mask, logits_to_keep=asked)
    one = kvprune.ComposedCache([policy])
    with torch.no_grad():
        model(ids[:1, :6], past_key_values=one)
        model(ids[:1, 6:20], past_key_values=one, logits_to_keep=asked)
    assert kept(cache, 0, [20, 21, 22, 23]) == kept(one, 0, [])
    newest = set(range(20 - max(asked, 1), 20))
    assert newest <= set(cache.columns(LAYERS - 1)[0, 0].tolist())


def test_drafts_of_a_row_that_pauses():
    """On record they are no tokens either, and taking them back brings nothing."""
    model, ids, caches = tiny_model(), prompt(2, 20), []
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 14:18] = 0
    for drafts in (True, False):
        cache = kvprune.ComposedCache([H2O(3, 4)])
        with torch.no_grad():
            model(ids[:, :14], past_key_values=cache)
            if drafts:
                cache.activate_past_recording()
                model(ids[:, 14:18], past_key_values=cache, attention_mask=mask[:, :18])
                cache.crop(-1)
            else:
                for i in range(14, 17):
                    now = mask[:, : i + 1]
                    model(ids[:, i : i + 1], past_key_values=cache, attention_mask=now)
        caches.append(cache)
    for row, hidden in ((0, [14, 15, 16]), (1, [])):
        assert kept(caches[0], row, hidden) == kept(caches[1], row, hidden)


# Layers that keep a state.


@pytest.fixture
def exact() -> Iterator[None]:
    """Their models compute in float32 whatever their weights are."""
    with torch.no_grad(), StaysDouble():
        yield


@pytest.mark.usefixtures("exact")
def test_a_state_stays_while_its_row_pauses():
    """Linear-attention layers have no slots to leave out: the state itself is held."""
    model, ids = attached_family("qwen3_next"), prompt(2, 16)
    mask, sizes = torch.ones(2, 16, dtype=torch.long), [9, 1, 1, 1, 1, 3]
    mask[0, 10:12] = 0
    cache, one, start, got = kvprune.ComposedCache(), kvprune.ComposedCache(), 0, []
    for size in sizes:
        new = slice(start, start + size)
        start += size
        now = {"attention_mask": mask[:, :start], "position_ids": positions(mask)[:, new]}
        got.append(model(ids[:, new], past_key_values=cache, **now).logits[0])
    expected = []
    for size in (slice(0, 9), slice(9, 10), slice(12, 13), slice(13, 16)):
        expected.append(model(ids[:1, size], past_key_values=one).logits[0])
    mine = torch.cat(got)[mask[0].bool()]
    torch.testing.assert_close(mine, torch.cat(expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("hidden", [slice(9, 11), slice(13, 14)], ids=["before", "behind"])
def test_padding_beside_new_tokens_is_refused_where_a_state_would_take_it_in(hidden):
    """A row of its own, or padding alone, are the ways out."""
    model, ids = attached_family("qwen3_next"), prompt(2, 14)
    mask, cache = torch.ones(2, 14, dtype=torch.long), kvprune.ComposedCache()
    mask[1, hidden] = 0
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        with pytest.raises(kvprune.KVPruneError, match=r"rows \[1\].*cannot skip it"):
            model(ids[:, 9:], past_key_values=cache, attention_mask=mask)
    assert cache.seen == 9


@pytest.mark.usefixtures("exact")
def test_left_padding_in_chunks_changes_no_state():
    """A row that has not begun yet, and begins in a later chunk, is as whole."""
    model, inputs = attached_family("qwen3_next"), left_padded(prompt(2, 15), [0, 8])
    logits = []
    for sizes in ([15], [4, 6, 5]):
        cache, start = kvprune.ComposedCache(), 0
        for size in sizes:
            new, start = slice(start, start + size), start + size
            mask = inputs["attention_mask"][:, :start]
            out = model(
                inputs["input_ids"][:, new],
                attention_mask=mask,
                position_ids=positions(inputs["attention_mask"])[:, new],
                past_key_values=cache,
            )
        logits.append(out.logits[:, -1])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-9, atol=1e-10)
