"""`output_attentions`: by column, with the columns; and configs that ask for them."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor

import kvprune
from kvprune.policies import H2O, StreamingLLM

from ..support.family_models import attached_family, family_model
from ..support.models import fresh_model, left_padded, prompt, tiny_model
from ..support.strategies import sdtp_pruner


@dataclass(frozen=True, repr=False)
class LongestKeys(kvprune.TokenPolicy):
    """Keeps each head's newest four slots and the eight with the longest keys: heads differ."""

    def rank_slots(self, slots):
        """See above."""
        budget = torch.full((slots.keys.shape[0],), 12)
        return kvprune.Ranking(slots.keys.norm(dim=-1), slots.newest(4), budget)


def renormalised(dense: Tensor, columns: Tensor) -> Tensor:
    """A layer's probabilities `[B, Hq, Q, N]` over `columns` `[B, 1|Hkv, S]` alone."""
    heads = dense.shape[1]
    columns = columns.repeat_interleave(heads // columns.shape[1], 1)[:, :, None]
    index = columns.clamp(min=0).expand(-1, -1, dense.shape[2], -1)
    found = dense.gather(-1, index).masked_fill(columns < 0, 0)
    return found / found.sum(-1, keepdim=True)


STEPS = (20, 1, 1, 1, 5, 1, 1)


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("policies", [[], [StreamingLLM(2, 7)], [LongestKeys()]], ids=repr)
@pytest.mark.parametrize("family", ["llama", "bloom", "falcon"])
def test_attentions_stand_by_the_columns_that_they_are_of(family, policies, padding):
    """Of the first layer, whose keys know of no eviction: the dense model's, renormalised."""
    eager = {"backend": "eager", "dtype": torch.float32}
    ours: Any = tiny_model(**eager) if family == "llama" else attached_family(family)
    plain: Any = fresh_model(**eager) if family == "llama" else family_model(family, "eager")
    ids = prompt(2, sum(STEPS)) % 40
    mask, cache, stop = (
        left_padded(ids, [0, padding])["attention_mask"],
        kvprune.ComposedCache(policies),
        0,
    )
    for count in STEPS:
        start, stop = stop, stop + count
        now = mask[:, :stop]
        with torch.no_grad():
            options = {"attention_mask": now, "output_attentions": True}
            got = ours(ids[:, start:stop], past_key_values=cache, **options).attentions
            dense = plain(ids[:, :stop], use_cache=False, **options).attentions
        columns = cache.attended(0)
        valid = now[:, start:].bool()
        assert (columns.diff() > 0).logical_or(columns[..., 1:] < 0).all()
        assert got[0].shape[-1] == columns.shape[-1] and (columns[..., -1] == stop - 1).all()
        expected = renormalised(dense[0][:, :, start:], columns)
        torch.testing.assert_close(
            got[0].transpose(1, 2)[valid], expected.transpose(1, 2)[valid], rtol=1e-4, atol=1e-5
        )
        assert all(one.shape[-1] == cache.attended(i).shape[-1] for i, one in enumerate(got))
    heads = {"llama": 2, "bloom": 4, "falcon": 1}[family]
    assert columns.shape[1] == (heads if policies == [LongestKeys()] else 1)


def test_pruned_tokens_are_neither_queries_nor_columns():
    """The query axis has the tokens that reached the layer: the newest of its columns."""
    model, cache = (
        tiny_model(backend="eager", dtype=torch.float32),
        kvprune.ComposedCache([sdtp_pruner(0.6)]),
    )
    with torch.no_grad():
        out = model(prompt(1, 20), past_key_values=cache, output_attentions=True)
    for layer, each in enumerate(out.attentions):
        columns = cache.attended(layer)
        assert torch.equal(columns, cache.columns(layer))
        assert each.shape[2:] == (columns.shape[-1], columns.shape[-1])
        assert bool((each[0, 0] > 0).tril().eq(each[0, 0] > 0).all())


class Reads(LogitsProcessor):
    """Reads the columns of each forward of a `generate`."""

    def __init__(self, cache: kvprune.ComposedCache) -> None:
        self.cache = cache
        self.columns: list[list[Tensor]] = []

    def __call__(self, input_ids, scores):
        """Changes nothing."""
        self.columns.append([self.cache.attended(layer) for layer in range(len(self.cache))])
        return scores


def test_columns_of_every_step_of_generate():
    """Read by a logits processor, they fit the attentions step by step."""
    model: Any = tiny_model(backend="eager", dtype=torch.float32)
    cache = kvprune.ComposedCache([StreamingLLM(2, 5)])
    reads = Reads(cache)
    out = model.generate(
        prompt(2, 12), cache=cache, max_new_tokens=5, output_attentions=True,
        return_dict_in_generate=True, logits_processor=[reads],
    )  # fmt: skip
    for step, columns in zip(out.attentions, reads.columns, strict=True):
        assert [a.shape[-1] for a in step] == [c.shape[-1] for c in columns]
    assert reads.columns[-1][0].tolist() == [[[0, 1, *range(10, 16)]]] * 2


def test_columns_that_nobody_asked_for():
    """After a forward without attentions, of another backend, or of no such layer."""
    cache = kvprune.ComposedCache([])
    refused = pytest.raises(kvprune.KVPruneError, match="output_attentions=True in a forward of a")
    model, ids = tiny_model(backend="eager"), prompt(1, 5)
    with torch.no_grad():
        with refused:
            cache.attended(0)
        model(ids, past_key_values=cache, output_attentions=True)
        assert cache.attended(0).tolist() == [[[*range(5)]]]
        held = cache.nbytes
        with refused:
            cache.attended(9)
        model(ids, past_key_values=cache)
        with refused:
            cache.attended(0)
        assert held > 4 * 8 * 5
        cache = kvprune.ComposedCache([])
        tiny_model()(ids, past_key_values=cache, output_attentions=True)
        with refused:
            cache.attended(0)


def eager_model(**config: Any) -> Any:
    return fresh_model(backend="eager", dtype=torch.float32, **config)


def test_a_config_may_ask_for_attentions_before_and_after_attach():
    """As of an eager model that is not attached; with our caches and with others."""
    first, second, ids = eager_model(), kvprune.attach(eager_model()), prompt(1, 9)
    for model in (first, second):
        model.config.output_attentions = True
    kvprune.attach(first)
    for model in (first, second, copy.deepcopy(second), pickle.loads(pickle.dumps(second))):
        with torch.no_grad():
            cache = kvprune.ComposedCache([StreamingLLM(1, 4)])
            outputs = [model(ids, past_key_values=c) for c in (cache, DynamicCache())]
            torch.testing.assert_close(outputs[0].attentions, outputs[1].attentions)
            assert cache.attended(0).tolist() == [[[*range(9)]]]
            with pytest.raises(kvprune.KVPruneError, match="output_attentions"):
                model(ids, past_key_values=kvprune.ComposedCache([H2O(2, 2)]))
    kvprune.detach(second)
    assert type(second.config._attn_implementation) is str
    assert second.config._attn_implementation == "eager"


@pytest.mark.parametrize(("backend", "asks"), [("eager", False), ("eager", True), ("sdpa", False)])
def test_an_attached_model_is_saved_as_any_other(backend, asks, tmp_path):
    """The file is that of the model before; nothing of ours stands in it."""
    model: Any = fresh_model(backend=backend, dtype=torch.float32)
    model.config.output_attentions = asks
    model.save_pretrained(tmp_path / "before")
    kvprune.attach(model).save_pretrained(tmp_path / "after")
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after")
    )
    assert before == after and "kvprune" not in json.dumps(after)
    AutoModelForCausalLM.from_pretrained(tmp_path / "after", attn_implementation=backend)


def test_a_config_of_another_backend_still_cannot_ask():
    """As in transformers."""
    model: Any = kvprune.attach(fresh_model())
    with pytest.raises(ValueError, match="set it to 'eager'"):
        model.config.output_attentions = True


@pytest.mark.slow
def test_eager_models_compile_as_before():
    """The name is followed by compiled code: one graph of a decode step."""
    model: Any = kvprune.attach(eager_model())
    cache, ids = kvprune.ComposedCache([StreamingLLM(2, 5)]), prompt(1, 16)
    with torch.no_grad():
        for start, stop in ((0, 12), (12, 13), (13, 14), (14, 15)):
            model(ids[:, start:stop], past_key_values=cache)
        twin = copy.deepcopy(cache)
        compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
        got = compiled(ids[:, 15:], past_key_values=cache).logits
        assert torch.equal(got, model(ids[:, 15:], past_key_values=twin).logits)
