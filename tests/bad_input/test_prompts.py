"""Prompts, masks and rows that do not fit what the cache has seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvprune import ComposedCache
from kvprune.policies import H2O, StreamingLLM

from ..support.models import (
    LAYERS,
    left_padded,
    plain_model,
    positions,
    prompt,
    tiny_model,
)
from .checks import LENGTH, assert_refused, filled, h2o, pruner


def test_prompt_no_longer_than_what_was_seen():
    """It must be all tokens so far and new ones, or new ones with a mask over all columns."""
    model, ids, cache = tiny_model(), prompt(1, LENGTH), filled(h2o())
    embeds = model.get_input_embeddings()(ids)
    assert_refused(
        cache,
        f"the cache has seen {LENGTH} columns: expected all tokens so far and at least a new one",
        lambda: model.generate(ids[:, :4], cache=cache, max_new_tokens=2),
        lambda: model.generate(ids, cache=cache, max_new_tokens=2),
        lambda: model.generate(input_ids=ids, cache=cache, max_new_tokens=2),
        lambda: model.generate(
            ids[:, :4], attention_mask=torch.ones(1, 4), cache=cache, max_new_tokens=2
        ),
        lambda: model.generate(inputs_embeds=embeds, cache=cache, max_new_tokens=2),
    )


def test_embeddings_no_longer_than_what_was_seen():
    """`generate` takes embeddings of all tokens only, whatever the mask says."""
    model, cache = tiny_model(), filled(h2o())
    embeds = model.get_input_embeddings()(prompt(1, 4))
    mask = torch.ones(1, LENGTH + 4, dtype=torch.long)
    assert_refused(
        cache,
        f"the cache has seen {LENGTH} columns",
        lambda: model.generate(
            inputs_embeds=embeds, attention_mask=mask, cache=cache, max_new_tokens=2
        ),
    )


def test_no_prompt_at_all():
    """`generate` would begin with one begin-of-sequence token, which is less than was seen."""
    model, cache = tiny_model(), filled(h2o())
    assert_refused(
        cache,
        f"the cache has seen {LENGTH} columns",
        lambda: model.generate(cache=cache, max_new_tokens=2),
    )


def masks(rows: int, columns: int) -> list[Tensor]:
    """All ones (which transformers drops early), and with left padding."""
    ones = torch.ones(rows, columns, dtype=torch.long)
    return [ones, left_padded(ones, [1] * rows)["attention_mask"]]


@pytest.mark.parametrize("columns", [2, LENGTH - 1, LENGTH + 1, 3 * LENGTH])
@pytest.mark.parametrize("padded", [False, True])
def test_mask_of_a_wrong_length_for_an_empty_cache(columns, padded):
    """By forward and by generate; the mask covers the prompt exactly."""
    model, ids, cache = tiny_model(), prompt(1, LENGTH), ComposedCache([h2o()])
    mask = masks(1, columns)[padded]
    assert_refused(
        cache,
        f"attention_mask: expected .*got .*{columns}",
        lambda: model(ids, attention_mask=mask, past_key_values=cache),
        lambda: model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=2),
    )


@pytest.mark.parametrize("columns", [2, LENGTH + 2, LENGTH + 4, 2 * LENGTH])
@pytest.mark.parametrize("padded", [False, True])
def test_mask_of_a_wrong_length_for_a_filled_cache(columns, padded):
    """Three new tokens take a mask over all 13 columns."""
    model, ids, cache = tiny_model(), prompt(1, 3), filled(h2o())
    mask = masks(1, columns)[padded]
    assert_refused(
        cache,
        rf"attention_mask: expected .*(\b13\b|10 \+ 3).*got .*{columns}",
        lambda: model(ids, attention_mask=mask, past_key_values=cache),
        lambda: model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=2),
    )


@pytest.mark.parametrize("padded", [False, True])
def test_mask_of_earlier_turns_for_a_forward(padded):
    """`generate` extends it, as it makes masks of its own; a forward is taken at its word."""
    model, ids, cache = tiny_model(), prompt(1, 3), filled(h2o())
    mask = masks(1, LENGTH)[padded]
    match = r"attention_mask: expected .*\b13\b.*got .*10"
    assert_refused(cache, match, lambda: model(ids, attention_mask=mask, past_key_values=cache))


@pytest.mark.parametrize("padded", [False, True])
def test_mask_of_other_rows(padded):
    """As many rows as the prompt has."""
    model, ids, cache = tiny_model(), prompt(1, LENGTH), ComposedCache([h2o()])
    mask = masks(2, LENGTH)[padded]
    assert_refused(
        cache,
        r"attention_mask: expected .*got",
        lambda: model(ids, attention_mask=mask, past_key_values=cache),
        lambda: model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=2),
    )


@pytest.mark.parametrize(
    "shape",
    [(LENGTH,), (1, LENGTH, LENGTH), (1, 1, LENGTH, LENGTH - 1), (1, 1, LENGTH, LENGTH + 2),
     (1, 1, LENGTH - 1, LENGTH), (1, 1, LENGTH + 2, LENGTH), (2, 1, LENGTH, LENGTH),
     (1, 3, LENGTH, LENGTH)],
)  # fmt: skip
def test_mask_of_a_wrong_shape(shape):
    """A forward takes `[B, columns]`, or `[1|B, 1|Hq, Q, columns]`, and nothing like it."""
    model, ids, cache = tiny_model(), prompt(1, LENGTH), ComposedCache([h2o()])
    mask = torch.ones(shape, dtype=torch.bool)
    assert_refused(
        cache,
        "attention_mask: expected .*got",
        lambda: model(ids, attention_mask=mask, past_key_values=cache),
    )


def test_batch_size_that_changes():
    """By forward, by generate and by beams; the error names both ways out."""
    model, ids, cache = tiny_model(), prompt(2, 2 * LENGTH), filled(h2o())
    options: Any = {"cache": cache, "max_new_tokens": 2}
    assert_refused(
        cache,
        "expected 1 rows as before, got 2. Use a new cache, or batch_repeat_interleave",
        lambda: model(ids, past_key_values=cache),
        lambda: model(ids[:, :1], past_key_values=cache),
        lambda: model.generate(ids, **options),
        lambda: model.generate(ids[:1], num_beams=2, **options),
        lambda: model.generate(ids[:1], num_return_sequences=2, do_sample=True, **options),
    )


def right_padded(rows: int, length: int) -> dict[str, Tensor]:
    """The last row ends three columns early."""
    ids, mask = prompt(rows, length), torch.ones(rows, length, dtype=torch.long)
    mask[-1, -3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("rows", [1, 2])
def test_batch_that_is_padded_on_the_right(rows):
    """With a mask or, in generate, without one; the error says which rows and what to set."""
    model, cache, batch = tiny_model(), ComposedCache([h2o()]), right_padded(rows, LENGTH)
    without_mask = {"input_ids": batch["input_ids"]}
    assert_refused(
        cache,
        rf"padded on the right.*in rows \[{rows - 1}\].*tokenizer.padding_side = 'left'",
        lambda: model(**batch, past_key_values=cache),
        lambda: model.generate(**batch, cache=cache, max_new_tokens=2),
        lambda: model.generate(**without_mask, cache=cache, max_new_tokens=2),
    )


def test_later_turn_that_is_padded_on_the_right():
    """A filled cache is handed a prompt some rows of which end early: by `generate`, which would
    go on with the logits of padding. (A forward takes it: a row may pause.)"""
    model, cache, batch = tiny_model(), filled(h2o(), rows=2), right_padded(2, LENGTH + 5)
    batch["input_ids"][:, :LENGTH] = prompt(2, LENGTH)
    new = {"input_ids": batch["input_ids"][:, -5:], "attention_mask": batch["attention_mask"]}
    assert_refused(
        cache,
        r"padded on the right.*in rows \[1\].*tokenizer.padding_side = 'left'",
        lambda: model.generate(**new, cache=cache, max_new_tokens=2),
        lambda: model.generate(**batch, cache=cache, max_new_tokens=2),
    )


def test_a_later_turn_that_asks_nothing_of_any_row():
    """There are no logits to go on with."""
    model, cache, ids = tiny_model(), filled(h2o(), rows=2), prompt(2, LENGTH)
    mask = torch.ones(2, LENGTH + 3, dtype=torch.long)
    mask[:, LENGTH:] = 0
    options: Any = {"attention_mask": mask, "cache": cache, "max_new_tokens": 2}
    assert_refused(
        cache,
        r"padded on the right, or empty, in rows \[0, 1\]",
        lambda: model.generate(ids[:, :3], **options),
        lambda: model.generate(torch.cat([ids, ids[:, :3]], 1), **options),
    )


HOLES = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1]])
"""A mask with zeros inside its rows, which is padding like any other."""


def assert_lists_no_padding(cache: ComposedCache) -> None:
    """`columns` names nothing that `HOLES` hides."""
    for layer in range(LAYERS):
        for row, columns in enumerate(cache.columns(layer)):
            hidden = (HOLES[row] == 0).nonzero().flatten()
            assert not torch.isin(columns, hidden).any()


@pytest.mark.parametrize("policies", [[], [StreamingLLM(4, 99)], [H2O(99, 99)], [pruner(keep=1.0)]])
def test_zeros_inside_a_mask_are_padding(policies):
    """Not an error: with room for all, the dense model's tokens under the same mask."""
    inputs, options = {"input_ids": prompt(2, 12), "attention_mask": HOLES}, {"max_new_tokens": 6}
    cache = ComposedCache(policies)
    got = tiny_model().generate(**inputs, cache=cache, **options)
    assert torch.equal(got, plain_model().generate(**inputs, **options))
    assert_lists_no_padding(cache)
    everything = [c for c in range(17) if c > 11 or HOLES[0, c]]
    assert [cache.columns(i)[0, 0].tolist() for i in range(LAYERS)] == [everything] * LAYERS


@pytest.mark.parametrize(
    "policies", [[H2O(2, 3)], [StreamingLLM(2, 3)], [pruner(keep=0.9), H2O(2, 3)]]
)
def test_zeros_inside_a_mask_use_up_no_budget(policies):
    """By forward and by generate: five tokens stay in every layer, row and head."""
    model, ids, places = tiny_model(), prompt(2, 12), positions(HOLES)
    for more in (0, 6):
        cache = ComposedCache(policies)
        options: Any = {"attention_mask": HOLES, "past_key_values": cache}
        model.generate(ids, max_new_tokens=more, **options) if more else model(
            ids, position_ids=places, **options
        )
        assert_lists_no_padding(cache)
        for layer in range(LAYERS):
            assert ((cache.columns(layer) >= 0).sum(-1) == 5).all()


@pytest.mark.parametrize("policies", [[], [h2o()], [pruner()]], ids=repr)
@pytest.mark.parametrize("places", [[0], slice(0, 2), torch.tensor(3), torch.tensor([0, 12]),
                                    torch.tensor([-13]), 1.0, "last"], ids=str)  # fmt: skip
def test_logits_of_tokens_that_are_not_there(policies, places):
    """Before anything is read."""
    cache, model, new = filled(*policies), tiny_model(), prompt(1, 12)
    match = "logits_to_keep.*expected (a number of tokens|places of 12 tokens)"
    assert_refused(cache, match, lambda: model(new, past_key_values=cache, logits_to_keep=places))


def test_embeddings_in_chunks():
    """transformers cuts ids alone."""
    cache, model = filled(h2o()), tiny_model()
    embeds = model.get_input_embeddings()(prompt(1, LENGTH + 12))
    options = {"cache": cache, "max_new_tokens": 2, "prefill_chunk_size": 4}
    match = "prefill_chunk_size=4 with inputs_embeds"
    assert_refused(cache, match, lambda: model.generate(inputs_embeds=embeds, **options))


# Taking back.


@pytest.mark.parametrize("policies", [[h2o()], [pruner(), StreamingLLM(1, 4)]], ids=repr)
@pytest.mark.parametrize("count", [-1, -LENGTH])
def test_crop_of_what_was_evicted(policies, count):
    """Cannot come back; the error says to copy beforehand."""
    cache = filled(*policies)
    assert_refused(cache, "evicted cannot come back.*copy.deepcopy", lambda: cache.crop(count))


@pytest.mark.parametrize("policies", [[], [h2o()], [pruner()]], ids=repr)
@pytest.mark.parametrize("count", [1, LENGTH, -LENGTH - 1])
def test_crop_of_what_is_not_there(policies, count):
    """Positive numbers, and more than were seen."""
    cache = filled(*policies)
    match = rf"crop\({count}\): expected minus the number of columns to take back, at most 10"
    assert_refused(cache, match, lambda: cache.crop(count))


@pytest.mark.parametrize("count", [-1.5, -1.0, "1", None])
def test_crop_of_no_whole_number(count):
    """Columns are counted in whole ones."""
    cache = filled()
    match = "expected minus the number of columns to take back"
    assert_refused(cache, match, lambda: cache.crop(count))
