"""Whatever policies have observed, by flash-attn and by what runs on a GPU, is what a CPU observes.

Against a stand-in of flash-attn's, and on the CPU as if it were a GPU: nothing was run on one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvprune
from kvprune.attention import received
from kvprune.policies import KVzip

from ..support.flash_stand_in import FlashStandIn
from ..support.models import fresh_model, prompt, tiny_model
from ..support.strategies import POLICIES
from ..support.turns import STEPS, assert_same, follow, on_the_cpu


@pytest.fixture(params=["flash-attn", "fused"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that attends as one with flash-attn does, or as one on a GPU without it."""
    if request.param == "fused":
        monkeypatch.setattr(received, "on_gpu", lambda tensor: True)
        return tiny_model()
    FlashStandIn((torch.float64,)).install(monkeypatch)
    flashing: Any = fresh_model()
    flashing.config._attn_implementation = "flash_attention_2"
    return kvprune.attach(flashing)


@pytest.mark.parametrize("listed", POLICIES, ids=repr)
@pytest.mark.parametrize("padding", [0, 9])
def test_policies_keep_what_they_keep_on_a_cpu(listed, padding, model):
    """The same columns, statistics and logits, in several turns."""
    expected = on_the_cpu("llama", [listed.make(12)], STEPS, [0, padding])
    assert_same(follow(model, [listed.make(12)], STEPS, [0, padding]), expected)


@pytest.mark.parametrize("plus", [False, True])
def test_a_second_reading_votes_as_on_a_cpu(plus, model):
    ids, found = prompt(2, 30), []
    with pytest.MonkeyPatch.context() as here:
        for reader in (model, tiny_model()):
            cache = kvprune.ComposedCache([KVzip(0.5, plus=plus, chunk=16)])
            logits = kvprune.read(reader, cache, ids)
            found.append((logits, cache))
            here.setattr(received, "on_gpu", lambda tensor: False)
    assert_same(*found)
