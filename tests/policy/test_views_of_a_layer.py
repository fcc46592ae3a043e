"""Views know the layer's output projection, and newest queries at a full budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvprune
from kvprune import ComposedCache, KVPruneError, Ranking
from kvprune.models.structure import OUTPUTS
from kvprune.policy import OneBudget, SlotView
from kvprune.statistics import Queries

from ..support.family_models import FAMILIES, attached_family
from ..support.models import LAYERS, fresh_model, prompt, tiny_model


class Notes(kvprune.TokenPolicy):
    """Keeps everything, and the views."""

    def __init__(self) -> None:
        super().__init__()
        self.views: list[SlotView] = []

    def rank_slots(self, slots: SlotView) -> None:
        """Notes the view."""
        self.views.append(slots)


def outputs(model: Any, cache: Any, ids: Any) -> list[tuple[Any, Any]]:
    """The inputs and outputs of every projection of attention's outputs in a forward."""
    found: list[tuple[Any, Any]] = []

    def note(module: Any, args: Any, output: Any) -> None:
        found.append((args[0].detach(), output.detach()))

    hooks = [
        module.register_forward_hook(note)
        for name, module in model.named_modules()
        if name.split(".")[-1] in OUTPUTS and not {"mlp", "linear_attn"} & set(name.split("."))
    ]
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_weight_is_the_projection_s(family):
    """Without its bias; by key/value head and query head."""
    if family == "jetmoe":
        pytest.skip("its outputs go through experts")
    model: Any = attached_family(family)
    notes = Notes()
    each = outputs(model, ComposedCache([notes]), prompt(1, 5))
    assert len(each) == len(notes.views) > 0
    for view, (given, got) in zip(notes.views, each, strict=True):
        weight = view.output_weight.to(given.dtype)
        if family == "deepseek_v3":
            # One latent head is stored, whose values are no outputs of heads.
            continue
        heads, groups, size, _ = weight.shape
        assert (heads, size) == (view.values.shape[1], view.values.shape[-1])
        split = given.reshape(*given.shape[:2], heads, groups, size)
        # Differences, in which biases cancel.
        expected = (got - got[:, :1]).reshape(1, 5, -1)
        made = torch.einsum("bqhgd,hgdc->bqc", split - split[:, :1], weight)
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
        assert not weight.requires_grad


def test_projections_of_other_forms():
    """An adapter counts; what has no projection says so."""
    peft = pytest.importorskip("peft")
    model: Any = fresh_model()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
    )
    kvprune.attach(adapted)
    notes = Notes()
    adapted(prompt(1, 5), past_key_values=ComposedCache([notes]))
    attention = model.model.layers[0].self_attn
    units = torch.eye(32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            notes.views[0].output_weight.flatten(0, 2), attention.o_proj(units)
        )
    kvprune.attach(attached_family("jetmoe"))
    notes = Notes()
    attached_family("jetmoe")(prompt(1, 5), past_key_values=ComposedCache([notes]))
    with pytest.raises(KVPruneError, match="JetMoeAttention has no projection named o_proj"):
        _ = notes.views[0].output_weight


class Looked(OneBudget):
    """What the newest query looks at, with the promise of a constant budget."""

    statistics = (Queries(1),)
    constant_budget = True

    def rank_slots(self, slots: SlotView) -> Ranking:
        """By the sum over heads; asks what a view says besides."""
        assert slots.scaling == pytest.approx(8**-0.5) and slots.output_weight is not None
        score = slots.looks(1).sum((2, 3))
        return Ranking(score, slots.newest(1), slots.tokens(self.budget))


class LookedAlike(Looked):
    """And that it asks nothing of a layer."""

    layers_alike = True

    def rank_slots(self, slots: SlotView) -> Ranking:
        """By the sum over heads."""
        score = slots.looks(1).sum((2, 3))
        return Ranking(score, slots.newest(1), slots.tokens(self.budget))


class LookedPlain(LookedAlike):
    """Without any promise."""

    constant_budget = layers_alike = False


@torch.no_grad()
def test_newest_queries_at_a_full_budget():
    """Where each token costs one slot, views say the same as anywhere."""
    ids, kept = prompt(2, 40), []
    for kind in (Looked, LookedAlike, LookedPlain):
        cache = ComposedCache([kind(9)])
        tiny_model()(ids[:, :20], past_key_values=cache, logits_to_keep=1)
        for at in range(20, 40):
            tiny_model()(ids[:, at : at + 1], past_key_values=cache)
        kept.append([cache.columns(layer).tolist() for layer in range(LAYERS)])
    assert kept[0] == kept[1] == kept[2]
