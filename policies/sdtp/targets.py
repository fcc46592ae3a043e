"""What heads are to learn of an example: how salient each of its prompt's tokens is, by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvprune.attention.masks import biased_mask
from kvprune.models.releases import with_cache
from kvprune.models.structure import argument, decoder_layers, with_argument

from .saliency import contribution, layer_inputs

Target = Callable[
    [Any, Sequence[int], Tensor, int, DynamicCache | None], tuple[list[Tensor], Tensor]
]
"""Takes a model, the stages' layers, ids `[1, m]`, how many of them are of the prompt, and a cache
of what is before them; the rest of the ids is the completion. Returns what enters those layers,
`[1, m, C]` each, and the saliency of the prompt's tokens, those in the cache included,
`[S, n]` float32. The cache then holds all ids."""


def removal(
    model: Any,
    layers: Sequence[int],
    ids: Tensor,
    size: int,
    cache: DynamicCache | None = None,
) -> tuple[list[Tensor], Tensor]:
    """What the completion loses when it cannot attend to a token from a stage on.

    By how much the log odds of the completion's tokens fall, to first order, when what they come
    from no longer attends to the token in the stage's layer and all deeper ones; 0 where they rise.
    That is the derivative with respect to a gate on the token's attention weights, or to a bias on
    its scores (for whole heads: Michel et al., 2019, section 4): `sum of a_i (v_i - o) . dT/do`
    over those layers, their heads and those queries, with `o` what a head gives, and `T` the sum of
    the log odds, whose gradient does not vanish where the model is sure. Not counted is what
    reaches the completion by way of other tokens, and a head that attends to one token alone counts
    for less than it loses. It costs a forward and, of the completion alone, one more with its
    backward.
    """
    cache = DynamicCache() if cache is None else cache
    inputs = hidden_states(model, layers, ids, cache)
    last, lowest = size - 1, min(layers)
    cache.crop(last - ids.shape[1])
    with torch.enable_grad(), biased(model, lowest, cache.get_seq_length() + 1) as biases:
        output = model(ids[:, last:], use_cache=True, **with_cache(model, cache))
        logits = output.logits[0, :-1]
        odds = _log_odds(logits.float(), ids[0, size:]).sum()
        slopes = torch.stack(torch.autograd.grad(odds, biases))
    layer: Any
    for layer in cache.layers:
        # Or the cache would keep the graph.
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return inputs, torch.stack([slopes[i - lowest :].sum(0).clamp(min=0) for i in layers])


def gradient(
    model: Any,
    layers: Sequence[int],
    ids: Tensor,
    size: int,
    cache: DynamicCache | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The paper's, gradient times input, signed; see `saliency`. Without a cache alone."""
    assert cache is None
    with torch.enable_grad(), layer_inputs(model, layers) as entered:
        logits = model(ids, use_cache=False).logits
        inputs = [entered[i] for i in layers]
        scores = contribution(logits, inputs)[0]
    return inputs, scores[:, :size].contiguous()


TARGETS: dict[str, Target] = {"removal": removal, "gradient": gradient}


def can_continue(model: Any, target: str) -> bool:
    """Whether it is the same after a cache of what is before.

    It is not where rotary frequencies depend on how long the whole is.
    """
    config = model.config.get_text_config(decoder=True)
    scaling = getattr(config, "rope_parameters", None) or {}
    nested = [v for v in scaling.values() if isinstance(v, dict)] or [scaling]
    kinds = {how.get("rope_type") for how in nested}
    return target == "removal" and not kinds & {"dynamic", "longrope"}


@torch.no_grad()
def hidden_states(
    model: Any, layers: Sequence[int], ids: Tensor, cache: DynamicCache | None = None
) -> list[Tensor]:
    """What enters the layers, `[1, m, C]` each, of tokens `[1, m]` that follow those in a cache."""
    # With a cache in any case, so that it is the same to the last bit.
    cache = DynamicCache() if cache is None else cache
    with layer_inputs(model, layers) as entered:
        model.base_model(ids, use_cache=True, **with_cache(model.base_model, cache))
    return [entered[i] for i in layers]


def _log_odds(logits: Tensor, truth: Tensor) -> Tensor:
    """Of each of the tokens `[m]` against all others, by logits `[m, V]`."""
    index = truth[:, None]
    others = logits.scatter(1, index, -torch.inf).logsumexp(1)
    return logits.gather(1, index)[:, 0] - others


@contextmanager
def biased(model: Any, lowest: int, count: int) -> Iterator[list[Tensor]]:
    """While open, forwards of one row have a bias of 0 on their attention scores.

    Args:
        model: of a family that pruning works for.
        lowest: the first layer to have one.
        count: how many tokens have one, the first ones, those in a cache included.

    Yields:
        by layer, from `lowest` on, `[count]` float32, to differentiate by.
    """
    layers = decoder_layers(model.base_model)[lowest:]
    biases = [torch.zeros(count, device=model.device, requires_grad=True) for _ in layers]
    handles = [
        layer.register_forward_pre_hook(partial(_add_bias, bias), with_kwargs=True)
        for layer, bias in zip(layers, biases, strict=True)
    ]
    try:
        yield biases
    finally:
        for handle in handles:
            handle.remove()


def _add_bias(bias: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden = argument(layer, args, kwargs, "hidden_states")
    mask = argument(layer, args, kwargs, "attention_mask")
    return with_argument(layer, args, kwargs, "attention_mask", biased_mask(hidden, mask, bias))
