"""The paper's saliency: how salient each token is at each stage, by gradient times input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.errors import KVPruneError
from kvprune.models.devices import device_of
from kvprune.models.families import check_family
from kvprune.models.structure import argument, decoder_layers, with_argument


def saliency(
    model: Any,
    input_ids: Tensor,
    layers: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    signed: bool = False,
) -> Tensor:
    """The saliency of tokens: how much each token's hidden state contributes to the model's logits.

    `s_i = | sum over features of dT/dx_i * x_i |` (paper, section 3.2), where `x` is the input
    of a decoder layer and `T` the sum over all positions of the largest logit, of the dense
    model on all tokens. The paper leaves `T` open; this choice worked best for us.

    Args:
        model: a transformers model with a language-model head, attached or not; its weights
            and their gradients are not touched.
        input_ids: `[B, N]`.
        layers: the decoder layers to look at, counted from 0; None for all.
        attention_mask: `[B, N]`, 0 for padding.
        signed: whether to leave out the absolute value.

    Returns:
        float32 `[B, len(layers), N]` on the device of the model's logits, 0 for padding.

    Raises:
        KVPruneError: the family is not supported, or a layer that the model does not have.
    """
    check_family(model)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    inputs = {name: t.to(device_of(model)) for name, t in inputs.items() if t is not None}
    wanted = _wanted(model, layers)
    with torch.enable_grad(), evaluating(model), layer_inputs(model, wanted) as entered:
        logits = model(**inputs, use_cache=False).logits
        scores = contribution(logits, [entered[i] for i in wanted], attention_mask)
    return scores if signed else scores.abs()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode; afterwards each module is in the mode that it was in."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def contribution(logits: Tensor, inputs: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """Gradient times input, signed: `[B, S, N]` float32.

    Args:
        logits: `[B, N, V]`.
        inputs: S tensors `[B, N, C]`, which the logits were computed from.
        mask: `[B, N]`, 0 for padding, which counts neither in T nor in the result.
    """
    largest = logits.amax(-1).float()
    if mask is not None:
        largest = largest * mask.to(largest.device)
    gradients = torch.autograd.grad(largest.sum(), inputs)
    pairs = zip(gradients, inputs, strict=True)
    each = [(g.float() * x.float()).sum(-1).to(logits.device) for g, x in pairs]
    scores = torch.stack(each, dim=1).detach()
    return scores if mask is None else scores * mask.to(scores.device)[:, None]


@contextmanager
def layer_inputs(model: Any, wanted: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collects the inputs of the decoder layers `wanted`, by layer, in forwards inside the context.

    The inputs have gradients; the graph begins at the first of them.
    """
    layers, entered = decoder_layers(model.base_model), dict[int, Tensor]()
    handles = [
        layers[i].register_forward_pre_hook(partial(_note, entered, i), with_kwargs=True)
        for i in wanted
    ]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def _note(
    entered: dict[int, Tensor],
    index: int,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    hidden = argument(layer, args, kwargs, "hidden_states")
    # The graph begins at the first layer that is wanted; without gradients, at each of them.
    if not entered or not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    entered[index] = hidden
    return with_argument(layer, args, kwargs, "hidden_states", hidden)


def _wanted(model: Any, layers: Sequence[int] | None) -> list[int]:
    known = range(len(decoder_layers(model.base_model)))
    wanted = list(known if layers is None else layers)
    if not wanted or not all(type(i) is int and i in known for i in wanted):
        raise KVPruneError(
            f"saliency: layers={layers!r}: expected decoder layers of 0 to {len(known) - 1}"
        )
    return wanted
