"""The hooks on decoder layers and their attention, in the order in which a forward meets them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ..cache.composed import ComposedCache
from ..engine.step import Step
from ..models.families import NOT_PER_TOKEN, has_own_attention, keeps_keywords, lost_keyword
from ..models.structure import argument, arguments_given, with_argument
from .forward import cache_in
from .own_attention import at_slots

_OF_HIDDEN = ("hidden", "second reading")
"""What statistics read of hidden states."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def hook_layers(base: nn.Module, layers: Any, attentions: list[nn.Module | None]) -> None:
    own = has_own_attention(base)
    bare = own or keeps_keywords(base)
    for index, (layer, attention) in enumerate(zip(layers, attentions, strict=True)):
        before = _before_linear_layer if attention is None else _before_layer
        before = _before_bare_layer if bare else before
        layer.register_forward_pre_hook(partial(before, index), with_kwargs=True)
        if own and attention is not None:
            attention.register_forward_pre_hook(_before_own_attention, with_kwargs=True)
            attention.register_forward_hook(_after_own_attention, with_kwargs=True)
        elif bare and attention is not None:
            attention.register_forward_pre_hook(partial(_before_attention, index), with_kwargs=True)
    layers[-1].register_forward_hook(_after_last_layer, with_kwargs=True)


def remove_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            function = hook.func if isinstance(hook, partial) else hook
            if function in _HOOKS:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


def _before_layer(
    index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    cache = cache_in(layer, args, kwargs)
    if cache is None:
        return None
    # Layers hand keywords that they do not know on to their attention.
    step = cache.step
    args, kwargs = _enter(step, index, layer, args, kwargs)
    _show(step, cache, index, layer, args, kwargs)
    return args, {**kwargs, "kvprune_layer": cache.at_layer(index)}


def _before_attention(
    index: int, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    """Pre-hook of the attention in a decoder layer that passes unknown keywords to nobody."""
    cache = cache_in(attention, args, kwargs)
    return None if cache is None else (args, {**kwargs, "kvprune_layer": cache.at_layer(index)})


def _enter(
    step: Step,
    index: int,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Arguments:
    """A layer's arguments, gathered to the tokens that enter it."""
    if not step.prunes:
        return args, kwargs
    if torch.compiler.is_compiling():
        # What is asked there breaks the graph. Behind a break inside a hook, compiled code goes on
        # with the arguments that the hook was handed, not with those that it returns.
        return torch.compiler.disable(_gather)(step, index, layer, args, kwargs)
    return _gather(step, index, layer, args, kwargs)


def _show(
    step: Step,
    cache: ComposedCache,
    index: int,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Shows the hidden states that enter a layer to statistics that read them, if some do."""
    if not step.reads.isdisjoint(_OF_HIDDEN):
        cache.at_layer(index).show(argument(layer, args, kwargs, "hidden_states"))


def _gather(
    step: Step, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    hidden = step.enter(index, argument(layer, args, kwargs, "hidden_states"))
    args, kwargs = with_argument(layer, args, kwargs, "hidden_states", hidden)
    for name, value in arguments_given(layer, args, kwargs).items():
        aligned = value if name in NOT_PER_TOKEN else step.align(value, hidden.device)
        if aligned is not value:
            args, kwargs = with_argument(layer, args, kwargs, name, aligned)
    return args, kwargs


def _before_linear_layer(
    index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    cache = cache_in(layer, args, kwargs)
    if cache is None or not cache.step.prunes:
        return None
    arguments = _enter(cache.step, index, layer, args, kwargs)
    # Here the mask is `[B, Q]`, or None for no padding. What fills shorter rows is masked too.
    mask = None if cache.step.complete else cache.step.columns >= 0
    return with_argument(layer, *arguments, "attention_mask", mask)


def _before_bare_layer(
    index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    """Pre-hook of a decoder layer whose attention has a hook of its own."""
    cache = cache_in(layer, args, kwargs)
    if cache is None:
        return None
    args, kwargs = _enter(cache.step, index, layer, args, kwargs)
    _show(cache.step, cache, index, layer, args, kwargs)
    return args, kwargs


def _before_own_attention(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    cache = cache_in(attention, args, kwargs)
    if cache is None:
        return None
    return at_slots(attention, args, kwargs, cache.at_layer(attention.layer_idx))


def _after_own_attention(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    cache = cache_in(attention, args, kwargs)
    if cache is None:
        return None
    layer = cache.at_layer(attention.layer_idx).on(output[0].device)
    layer.step.attentions += 1
    layer.observe(output[1], attention)
    output = (output[0], layer.in_order(output[1]), *output[2:])
    layer.evict(attention=attention)
    return output


def _after_last_layer(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    cache = cache_in(layer, args, kwargs)
    if cache is None:
        return None
    step = cache.step
    if step.attentions != len(step.layer_steps):
        raise lost_keyword(layer)
    if isinstance(output, tuple):
        return (step.leave(output[0]), *output[1:])
    return step.leave(output)


_HOOKS = (
    _before_layer,
    _before_linear_layer,
    _before_bare_layer,
    _before_attention,
    _before_own_attention,
    _after_own_attention,
    _after_last_layer,
)
