"""Layers with a local mask hold only what a later query can see, whatever the policy."""

from __future__ import annotations

import copy

import pytest
import torch

import kvprune
from kvprune.policies import H2O
from kvprune.storage.buffers import SLACK

from ..support.family_models import WINDOW, StaysDouble, attached_family, local_of
from ..support.models import LAYERS, left_padded, prompt
from ..support.strategies import EVICTING

LOCAL = ["mistral-window", "gemma2", "gpt_oss", "llama4_text"]


class Run:
    """One cache on one family, with the mask kept beside it."""

    def __init__(self, family: str, policies: list[kvprune.TokenPolicy]) -> None:
        self.model, self.cache = attached_family(family), kvprune.ComposedCache(policies)
        self.ids = left_padded(prompt(2, 40), [0, 3])

    def step(self, count: int) -> torch.Tensor:
        """The next tokens; logits of the last one."""
        end = self.cache.seen + count
        mask, new = self.ids["attention_mask"][:, :end], self.ids["input_ids"][:, end - count : end]
        with torch.no_grad(), StaysDouble():
            output = self.model(new, attention_mask=mask, past_key_values=self.cache)
        logits: torch.Tensor = output.logits[:, -1]
        return logits


@pytest.mark.parametrize("steps", [[1, 1, 3, 5, 1, 1, 1, 1, 9, 1], [20, 1, 1, 1, 1, 1, 1, 7, 1]])
@pytest.mark.parametrize("family", LOCAL)
def test_dense_holds_what_can_be_seen(family, steps):
    """After every step, row by row: a window less its next query, or the chunk so far."""
    run, local = Run(family, []), local_of(family)
    for count in steps:
        run.step(count)
        for layer, here in enumerate(local):
            for row, padding in enumerate([0, 3]):
                seen, first = run.cache.seen, min(padding, run.cache.seen)
                oldest = 0 if here is None else here.oldest(seen, first)
                expected = list(range(max(oldest, first), seen))
                columns = run.cache.columns(layer)[row, 0]
                assert [int(c) for c in columns if c >= 0] == expected


@pytest.mark.parametrize("family", LOCAL)
def test_memory_is_freed(family):
    """Room for a window and the spare slots, however much was read."""
    run = Run(family, [])
    run.step(30)
    for _ in range(9):
        run.step(1)
    for layer, here in zip(run.cache.layers, local_of(family), strict=True):
        assert layer.rectangles[0].capacity <= WINDOW + SLACK or here is None


@pytest.mark.parametrize("policy", EVICTING, ids=repr)
@pytest.mark.parametrize("family", LOCAL)
def test_policies_spend_nothing_on_what_cannot_be_seen(family, policy):
    """A roomy budget holds what the dense cache holds; a small one a part of it."""
    dense, roomy, small = (Run(family, p) for p in ([], [policy.roomy()], [policy.make(3)]))
    for count in (15, 1, 1, 6, 1, 1):
        for run in (dense, roomy, small):
            run.step(count)
        for layer in range(LAYERS):
            assert held(roomy, layer) == held(dense, layer)
            assert held(small, layer) <= held(dense, layer)


def held(run: Run, layer: int) -> set[tuple[int, int]]:
    """Row and column of everything that a layer holds."""
    columns = run.cache.columns(layer)
    return {(row, int(c)) for row in range(2) for c in columns[row].flatten() if c >= 0}


@pytest.mark.parametrize("family", LOCAL)
def test_crop_is_exact_or_refused(family):
    """Exact while nothing was dropped; refused, and unchanged, where it would have to come back."""
    run, whole = Run(family, []), Run(family, [])
    run.step(WINDOW - 1)
    run.cache.crop(-2)
    whole.step(WINDOW - 3)
    torch.testing.assert_close(run.step(2), whole.step(2), rtol=1e-9, atol=1e-10)
    run.step(WINDOW + 3)
    before = [run.cache.columns(i).tolist() for i in range(LAYERS)]
    # One column further back is still in every row's chunk.
    for count in (1, 3, WINDOW)[family == "llama4_text" :]:
        with pytest.raises(kvprune.KVPruneError, match=r"sees 6 columns.*copy\.deepcopy"):
            run.cache.crop(-count)
    run.cache.crop(0)
    assert run.cache.seen == 2 * WINDOW + 2
    assert [run.cache.columns(i).tolist() for i in range(LAYERS)] == before


def test_deepcopy_and_beams_carry_it():
    """What a layer can see goes with it: to copies, other rows, and after a reset."""
    run = Run("gemma2", [H2O(3, 3)])
    run.step(8)
    twin = copy.deepcopy(run.cache)
    assert [layer.local for layer in twin.layers] == [layer.local for layer in run.cache.layers]
    run.cache.reorder_cache(torch.tensor([1, 0]))
    run.cache.reset()
    run.step(10)
    assert run.cache.columns(0).min() >= 10 - WINDOW + 1
