"""The targets of heads: how salient each token of an example's prompt is, by stage."""

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
"""A target takes, in this order:

* a model;
* the layers that the stages stand before;
* ids `[1, m]`, those of the prompt first, then those of the completion;
* how many of these ids are of the prompt;
* a cache of the tokens before these ids, or None.

The target returns the inputs of the layers, `[1, m, C]` each, and the saliency of the prompt's
tokens, tokens in the cache included, `[S, n]` float32. The cache then holds all ids.
"""


def removal(
    model: Any,
    layers: Sequence[int],
    ids: Tensor,
    size: int,
    cache: DynamicCache | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The loss of the completion when it cannot attend to a token from a stage on.

    The saliency of a token is, to first order, how much the log odds of the completion's tokens
    fall when the tokens that predict them no longer attend to it in the stage's layer and all
    deeper ones; 0 where the log odds rise. This is the derivative with respect to a gate on the
    token's attention weights, or to a bias on its scores (for whole heads: Michel et al., 2019,
    section 4): `sum of a_i (v_i - o) . dT/do` over those layers, their heads and those queries,
    with `o` the output of a head, and `T` the sum of the log odds, whose gradient does not vanish
    where the model is sure. Two effects are missed: effects on the completion by way of other
    tokens are not counted, and a head that attends to one token alone counts for less than it
    loses. The target costs a forward and, for the completion alone, a second one with its
    backward.
    """
    cache = DynamicCache() if cache is None else cache
    inputs = hidden_states(model, layers, ids, cache)
    last, lowest = size - 1, min(layers)
    # The prompt's last token is read again: the completion's first token is predicted from it.
    cache.crop(last - ids.shape[1])
    with torch.enable_grad(), biased(model, lowest, cache.get_seq_length() + 1) as biases:
        output = model(ids[:, last:], use_cache=True, **with_cache(model, cache))
        logits = output.logits[0, :-1]
        odds = _log_odds(logits.float(), ids[0, size:]).sum()
        slopes = torch.stack(torch.autograd.grad(odds, biases))
    layer: Any
    for layer in cache.layers:
        # Keys and values that are not detached would keep the graph.
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return inputs, torch.stack([slopes[i - lowest :].sum(0).clamp(min=0) for i in layers])


def gradient(
    model: Any,
    layers: Sequence[int],
    ids: Tensor,
    size: int,
    cache: DynamicCache | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The paper's target: gradient times input, signed; see `saliency`. Takes no cache."""
    assert cache is None
    with torch.enable_grad(), layer_inputs(model, layers) as entered:
        logits = model(ids, use_cache=False).logits
        inputs = [entered[i] for i in layers]
        scores = contribution(logits, inputs)[0]
    return inputs, scores[:, :size].contiguous()


TARGETS: dict[str, Target] = {"removal": removal, "gradient": gradient}


def can_continue(model: Any, target: str) -> bool:
    """Whether a target is the same when it is computed after a cache of the tokens before.

    The target "gradient" takes no cache; and nothing is the same where rotary frequencies depend
    on the length of the whole sequence.
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
    """The inputs of the layers, `[1, m, C]` each, for tokens `[1, m]` that follow a cache's."""
    # Always with a cache, so that results are the same to the last bit.
    cache = DynamicCache() if cache is None else cache
    with layer_inputs(model, layers) as entered:
        model.base_model(ids, use_cache=True, **with_cache(model.base_model, cache))
    return [entered[i] for i in layers]


def _log_odds(logits: Tensor, truth: Tensor) -> Tensor:
    """The log odds of each of the tokens `[m]` against all others, from logits `[m, V]`."""
    index = truth[:, None]
    others = logits.scatter(1, index, -torch.inf).logsumexp(1)
    return logits.gather(1, index)[:, 0] - others


@contextmanager
def biased(model: Any, lowest: int, count: int) -> Iterator[list[Tensor]]:
    """Adds a bias of 0 to attention scores, in forwards of one row inside the context.

    Args:
        model: a model of a family that pruning works for.
        lowest: the first layer that has a bias.
        count: how many tokens have a bias, the first ones, those in a cache included.

    Yields:
        the biases by layer, from `lowest` on, `[count]` float32 each, to differentiate by.
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
