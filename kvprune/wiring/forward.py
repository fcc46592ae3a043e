"""The forwards of an attached model and of its base model: one step of a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..cache.composed import ComposedCache
from ..errors import KVPruneError
from ..models.backends import PREFIX
from ..models.families import has_own_attention
from ..models.releases import (
    CACHE_ARGUMENTS,
    cache_name,
    checkpointing_off,
    checkpoints_activations,
    renamed,
)
from ..models.structure import argument, base_of, decoder_layers, takes, with_argument
from .methods import method_of


def cache_in(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ComposedCache | None:
    """The cache of this call, if it is one of ours."""
    for name in CACHE_ARGUMENTS:
        # A module has only one of these names. Calls without a cache of ours come here, too.
        if name in kwargs:
            return kwargs[name] if isinstance(kwargs[name], ComposedCache) else None
    for name in CACHE_ARGUMENTS:
        cache = argument(module, args, kwargs, name)
        if isinstance(cache, ComposedCache):
            return cache
    return None


def forward_of_head(
    model: nn.Module, inner: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    """The forward of a model with a head: says which logits are asked for, before the base runs.

    Args:
        model: the model.
        inner: what was the model's own forward; None for the one of its class.
        args, kwargs: of the call.
    """
    forward = method_of(model, "forward", inner)
    kwargs = renamed(kwargs, cache_name(model))
    cache = cache_in(model, args, kwargs)
    if cache is None:
        return forward(*args, **kwargs)
    _check_head(model, cache, args, kwargs)
    asked = argument(model, args, kwargs, "logits_to_keep")
    cache.ask_logits(0 if asked is None else asked)
    try:
        return forward(*args, **kwargs)
    finally:
        cache.ask_logits(None)


def _check_head(
    model: nn.Module, cache: ComposedCache, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuses losses over all tokens where some leave the model early."""
    if not any("rank_hidden" in p.hooks for p in cache.policies):
        return
    if argument(model, args, kwargs, "labels") is not None:
        raise KVPruneError(
            "labels with a policy that prunes hidden states: dropped tokens leave the model "
            "early, so a loss over all tokens would be wrong. Take the logits of the tokens in "
            "question through logits_to_keep and compute the loss from those"
        )
    routed = argument(model, args, kwargs, "output_router_logits")
    if routed is None:
        routed = getattr(model.config, "output_router_logits", False)
    if routed:
        raise KVPruneError(
            "output_router_logits=True with a policy that prunes hidden states: layers see "
            "different numbers of tokens, so the auxiliary loss over all of them would be wrong. "
            "Pass output_router_logits=False (or set it in the model's config), or use policies "
            "that evict slots alone"
        )


def forward_of_base(
    base: nn.Module, inner: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    """The forward of the model that has the decoder layers: one step of the cache.

    Args:
        base: the model.
        inner: what was the model's own forward; None for the one of its class.
        args, kwargs: of the call.
    """
    forward = method_of(base, "forward", inner)
    kwargs = renamed(kwargs, cache_name(base))
    cache = cache_in(base, args, kwargs)
    if cache is None:
        return forward(*args, **kwargs)
    begun = cache.guard.own_step()
    if begun is not None and begun.around:
        # The step was begun around the base, so that masks were made within it.
        args, kwargs = _placed(cache, base, args, kwargs)
        return forward(*args, **kwargs)
    return _in_step(cache, base, base, forward, args, kwargs)


def forward_around_base(
    around: Any, inner: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    """The forward of a model that makes masks and runs its language model, the base, with them.

    Masks are made within a step of the cache, so this is where it begins.

    Args:
        around: the model.
        inner: what was the model's own forward; None for the one of its class.
        args, kwargs: of the call.
    """
    forward = method_of(around, "forward", inner)
    kwargs = renamed(kwargs, cache_name(around))
    cache = cache_in(around, args, kwargs)
    if cache is None:
        return forward(*args, **kwargs)
    return _in_step(cache, around, base_of(around), forward, args, kwargs)


def _in_step(
    cache: ComposedCache,
    module: nn.Module,
    base: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A forward within a step of the cache.

    Args:
        cache: the cache.
        module: the module whose forward it is: the base, or a model around it.
        base: the model that has the decoder layers.
        forward: what is run.
        args, kwargs: its arguments.
    """
    tokens, asks_probabilities = _open_step(cache, module, base, args, kwargs)
    done = False
    try:
        if tokens.dim() == 2:
            cache.note_ids(tokens)
        if asks_probabilities:
            cache.step.attended = {}
        cache.step.around = module is not base
        if module is base:
            args, kwargs = _placed(cache, base, args, kwargs)
        output = forward(*args, **kwargs)
        done = True
    finally:
        cache.close_step(done)
    return output


def _placed(
    cache: ComposedCache, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The base's arguments, with the positions that the cache assigns, if it does."""
    step = cache.step
    if step.cache_positions is None or not takes(base, "position_ids"):
        return args, kwargs
    return with_argument(base, args, kwargs, "position_ids", step.position_ids)


def _open_step(
    cache: ComposedCache,
    module: nn.Module,
    base: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, bool]:
    """Begins a step; the forward's ids or embeddings, and whether it is asked for attentions."""
    _check_forward(module, base, args, kwargs)
    cache.bind(base._kvprune, base)
    asks_probabilities = argument(module, args, kwargs, "output_attentions")
    if asks_probabilities is None:
        asks_probabilities = base.config.output_attentions
    if asks_probabilities and cache.attends_in_pieces:
        raise KVPruneError(
            "output_attentions=True with a policy that observes attention, or with drafts and a "
            "policy that evicts: attention is computed piece by piece, and the probabilities are "
            "never there as a whole. Leave it out, or use policies without statistics"
        )
    tokens = argument(module, args, kwargs, "input_ids")
    if tokens is None:
        tokens = argument(module, args, kwargs, "inputs_embeds")
    if tokens is None:
        raise KVPruneError("a forward without tokens: expected input_ids or inputs_embeds")
    mask = argument(module, args, kwargs, "attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise KVPruneError(f"attention_mask: expected a tensor, got {type(mask).__name__}")
    positions = argument(module, args, kwargs, "position_ids")
    cache.open_step(tokens.shape[0], tokens.shape[1], mask, tokens.device, positions)
    return tokens, bool(asks_probabilities)


def _check_forward(
    module: nn.Module, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    count, known = len(decoder_layers(base)), base._kvprune.num_layers
    if count != known:
        raise KVPruneError(
            f"the model had {known} decoder layers when kvprune was attached, and has {count} now: "
            f"call kvprune.attach(model) again, and use a new cache"
        )
    if argument(module, args, kwargs, "use_cache") is False:
        raise KVPruneError("use_cache=False with a ComposedCache: leave out one of the two")
    if base.training and checkpoints_activations(base):
        raise KVPruneError(
            f"gradient checkpointing in training hides the cache from the layers: call "
            f"model.{checkpointing_off(base)}() or model.eval() first"
        )
    wired = str(base.config._attn_implementation).startswith(PREFIX)
    if not wired and not has_own_attention(base):
        raise KVPruneError(
            f"the attention implementation became {base.config._attn_implementation!r} after "
            f"attach: call kvprune.attach(model) again"
        )
