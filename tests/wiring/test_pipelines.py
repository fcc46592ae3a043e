"""`pipeline("text-generation")` with cache=: every prompt as if it had been given alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.policies import H2O

from ..support.models import VOCAB, prompt, tiny_model
from ..support.strategies import POLICIES

PROMPTS = ["5 6 7 8 9 10 11 12 13", "21 22 23", "31 32 33 34 35 36 37 38 39 40 41 42 43 44 45"]
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}


class Maker:
    """Makes a fresh cache per call, and keeps it to look at."""

    def __init__(self, make) -> None:
        self.make, self.made = make, list[ComposedCache]()

    def __call__(self) -> ComposedCache:
        self.made.append(ComposedCache([self.make()]))
        return self.made[-1]


def numbers_tokenizer() -> PreTrainedTokenizerFast:
    """Each number is the token of that id; a chat is its messages one after the other."""
    words = {"[PAD]": 0, **{str(i): i for i in range(1, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


def alone(text: str, policy: kvprune.TokenPolicy) -> str:
    """Returns what `generate` says to one prompt with a cache of its own, without padding."""
    ids = torch.tensor([[int(word) for word in text.split()]])
    cache = ComposedCache([policy])
    model: Any = tiny_model()
    tokens = model.generate(ids, cache=cache, max_new_tokens=6, do_sample=False)
    return " ".join(str(t) for t in tokens[0, ids.shape[1] :].tolist() if t != 0)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("at", ["pipeline", "call"])
def test_every_prompt_has_a_fresh_cache(policy, size, at):
    """One by one and in padded batches; given to the pipeline once or to a call."""
    maker = Maker(lambda: policy.make(5))
    once, each = ({"cache": maker}, {}) if at == "pipeline" else ({}, {"cache": maker})
    pipe = pipeline("text-generation", model=tiny_model(), tokenizer=numbers_tokenizer(), **once)
    said = pipe(PROMPTS, batch_size=size, **OPTIONS, **each)
    assert [s[0]["generated_text"] for s in said] == [alone(t, policy.make(5)) for t in PROMPTS]
    assert len(maker.made) == {1: 3, 2: 2}[size]


def test_chats():
    """Messages instead of text, one and several of them."""
    maker = Maker(lambda: H2O(2, 3))
    pipe = pipeline("text-generation", model=tiny_model(), tokenizer=numbers_tokenizer())
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    said = pipe(chats, cache=maker, **OPTIONS)
    assert [s[0]["generated_text"] for s in said] == [alone(t, H2O(2, 3)) for t in PROMPTS]
    (single,) = pipe(chats[0], cache=maker, **OPTIONS)
    assert single["generated_text"] == alone(PROMPTS[0], H2O(2, 3))
    assert len(maker.made) == 4


def test_a_callable_may_hand_out_copies_of_a_prefix():
    """As of a system prompt, read once."""
    prefix, model = prompt(1, 20), tiny_model()
    kept = ComposedCache([H2O(4, 4)])
    with torch.no_grad():
        model(prefix, past_key_values=kept)
    for seed in (1, 2):
        ids = torch.cat([prefix, prompt(1, 5, seed)], 1)
        one = model.generate(ids, cache=lambda: copy.deepcopy(kept), max_new_tokens=5)
        two = model.generate(ids, cache=copy.deepcopy(kept), max_new_tokens=5)
        assert torch.equal(one, two)
    assert kept.seen == 20


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ("dynamic", "str"),
        (H2O(2, 2), "H2O"),
        ([H2O(2, 2)], "list"),
        (lambda: None, "returned NoneType"),
        (lambda: [H2O(2, 2)], "returned list"),
        (ComposedCache, "type"),
    ],
)
def test_anything_else_is_refused(given, got):
    """With what was expected, what came and how to mend it."""
    with pytest.raises(KVPruneError, match=rf"cache=lambda: ComposedCache.*{got}"):
        tiny_model().generate(prompt(1, 5), cache=given, max_new_tokens=2)
