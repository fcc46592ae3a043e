"""`torch.compile(model.forward)`: the same numbers. It breaks the graph (see README)."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import kvprune

from .models import fresh_model, prompt
from .strategies import POLICIES


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, *POLICIES], ids=repr)
def test_compiled_decoding_is_bit_for_bit(policy):
    """Token by token, at a full budget; a step that has been compiled is not compiled again."""
    torch._dynamo.reset()
    model, ids, counter = kvprune.attach(fresh_model()), prompt(1, 28), CompileCounter()
    compiled = torch.compile(model.forward, backend=counter)
    caches = [kvprune.ComposedCache([policy.make(8)] if policy else []) for _ in range(2)]
    frames = []
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :20], past_key_values=cache)
        for i in range(20, 28):
            new = ids[:, i : i + 1]
            one, two = (
                f(new, past_key_values=c) for f, c in zip((compiled, model), caches, strict=True)
            )
            assert torch.equal(one.logits, two.logits)
            frames.append(counter.frame_count)
    # A union keeps now more and now fewer, which are two ways to go.
    assert frames[0] > 0 and frames[5] == frames[7]
