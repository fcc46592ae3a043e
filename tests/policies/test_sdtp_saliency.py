"""Saliency against finite differences of what the model says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvprune
from kvprune import KVPruneError
from kvprune.models.structure import decoder_layers
from kvprune.policies.sdtp import saliency

from ..support.models import LAYERS, fresh_model, left_padded, plain_model, prompt, tiny_model

FAMILIES = ["llama", "qwen3", "gpt_neox", "mistral-window"]
STEP = 1e-5


def said(model: Any, ids: torch.Tensor, layer: int, token: int, factor: float) -> float:
    """T, with one token's input of one layer multiplied by `factor`."""

    def scale(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[:, token] *= factor
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    handle = decoder_layers(model.base_model)[layer].register_forward_pre_hook(
        scale, with_kwargs=True
    )
    try:
        with torch.no_grad():
            return float(model(ids, use_cache=False).logits.max(-1).values.sum())
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_is_what_t_gains_as_an_input_grows(family):
    """dT / d epsilon at x * (1 + epsilon) is gradient times input; central differences."""
    model, ids = plain_model(family), prompt(1, 20)
    found = saliency(model, ids, signed=True)
    for layer in (0, 2, 3):
        for token in (0, 5, 19):
            ends = [said(model, ids, layer, token, 1 + e) for e in (STEP, -STEP)]
            slope = (ends[0] - ends[1]) / (2 * STEP)
            # The scores are float32; in gpt_neox and others some steps are so, too.
            assert float(found[0, layer, token]) == pytest.approx(slope, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_attached_and_plain_models_agree(family):
    """An attached model without a cache is the dense model; the same under `no_grad`."""
    ids = prompt(2, 20)
    expected = saliency(plain_model(family), ids)
    with torch.no_grad():
        got = saliency(tiny_model(family), ids)
    assert got.shape == (2, LAYERS, 20) and got.dtype == torch.float32
    assert not got.requires_grad and bool((got > 0).any(-1).all())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_unsigned_is_the_magnitude_of_signed():
    """And some contributions are negative."""
    signed = saliency(tiny_model(), prompt(1, 20), signed=True)
    assert bool((signed < 0).any()) and bool((signed > 0).any())
    assert torch.equal(saliency(tiny_model(), prompt(1, 20)), signed.abs())


@pytest.mark.parametrize("layers", [[2], [3, 0], (1, 2, 1), range(4)])
def test_layers_come_in_the_order_asked_for(layers):
    """Whatever the order, each is what it is among all."""
    whole = saliency(tiny_model(), prompt(1, 15))
    some = saliency(tiny_model(), prompt(1, 15), layers)
    torch.testing.assert_close(some, whole[:, list(layers)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [[], [LAYERS], [-1], [0, 9], [True], [1.0], ["1"]])
def test_layers_that_the_model_does_not_have(layers):
    """The error names them and those that there are."""
    with pytest.raises(KVPruneError, match=r"saliency: layers=.*decoder layers of 0 to 3"):
        saliency(tiny_model(), prompt(1, 5), layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_gives_0_and_rows_do_not_influence_each_other(family):
    """A row is what it is alone, without padding; positions are relative in these families."""
    ids = prompt(3, 20)
    found = saliency(tiny_model(family), **left_padded(ids, [0, 7, 15]))
    for row, padding in enumerate([0, 7, 15]):
        alone = saliency(tiny_model(family), ids[row : row + 1, padding:])
        assert not found[row, :, :padding].any()
        torch.testing.assert_close(found[row, :, padding:], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_behind_a_row_has_no_say(family):
    """It attends to the row's tokens, but what it says does not count."""
    ids, mask = prompt(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, 14:] = 0
    found = saliency(tiny_model(family), ids, attention_mask=mask)[1]
    alone = saliency(tiny_model(family), ids[1:, :14])[0]
    assert not found[:, 14:].any()
    torch.testing.assert_close(found[:, :14], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_weights_and_their_gradients_are_not_touched(frozen):
    """Nor is `requires_grad`; no hook is left behind."""
    model = kvprune.attach(fresh_model())
    first, *others = model.parameters()
    first.grad = torch.full_like(first, 3.0)
    for parameter in others[: 5 * frozen]:
        parameter.requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad, p._version) for n, p in model.named_parameters()}
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    saliency(model, prompt(1, 12), [1, 3])
    for name, parameter in model.named_parameters():
        weight, wanted, version = before[name]
        assert torch.equal(parameter, weight) and parameter._version == version
        assert parameter.requires_grad == wanted
    assert torch.equal(first.grad, torch.full_like(first, 3.0))
    assert all(p.grad is None for p in others)
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]


def test_a_model_that_is_not_supported():
    """Refused by name."""
    with pytest.raises(KVPruneError, match="PreTrainedModel"):
        saliency(torch.nn.Linear(2, 2), prompt(1, 5))


def test_saliency_is_that_of_the_model_in_eval_mode():
    """Dropout is off, and the modules are in training mode again afterwards."""
    model = fresh_model(attention_dropout=0.5)
    expected = saliency(model, prompt(1, 20))
    model.train()
    assert torch.equal(saliency(model, prompt(1, 20)), expected)
    assert all(m.training for m in model.modules())
