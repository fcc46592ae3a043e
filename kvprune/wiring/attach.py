"""Wires a model: hooks, `generate(cache=...)`, attention and masks. Decides nothing.

Every hook is a module-level callable and finds the cache among the arguments of the call, so
a model holds no state of a sequence, can be deep-copied and pickled, and serves any number
of caches and threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..attention.masks import mask_or_rule
from ..models.attachment import Attachment
from ..models.backends import BACKENDS, PREFIX, backend_of
from ..models.families import (
    attention_of,
    cannot_prune,
    cannot_record,
    cannot_show_queries,
    check_family,
    has_own_attention,
    linear_layers,
    local_layers,
    makes_masks,
)
from ..models.parallel import process_group
from ..models.releases import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    check_model,
    check_release,
)
from ..models.structure import base_of, check_kind, decoder_layers, query_heads, unwrapped
from .attention import name_of, slot_attention
from .forward import forward_around_base, forward_of_base, forward_of_head
from .generate import (
    generate_batch,
    generate_with_cache,
    get_logits_processor,
    get_stopping_criteria,
    prepare_cache_for_generation,
)
from .hooks import hook_layers, remove_hooks
from .methods import replace_method, restore_methods


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Lets a model run with a `ComposedCache`; without one it computes what it did before.

    Can be called again at any time (as after `model.set_attn_implementation`).

    Args:
        model: a decoder-only transformers model, with or without its language-model head,
            whose attention implementation is "sdpa", "eager" or "flash_attention_2" (with the
            package flash-attn; see `flash`); or a PEFT model around one.

    Returns:
        the same object.

    Raises:
        KVPruneError: the family is not supported; the model is unchanged then.
    """
    given, model = model, unwrapped(model)
    check_kind(model)
    check_release(model)
    check_family(model)
    base: Any = base_of(model)
    layers = decoder_layers(base)
    states = linear_layers(model)
    attentions = [
        None if linear else attention_of(base, layer)
        for layer, linear in zip(layers, states, strict=True)
    ]
    check_model(base, [layer for layer, linear in zip(layers, states, strict=True) if not linear])
    heads = query_heads(base)
    attachment = Attachment(
        type(model).__name__,
        len(layers),
        heads,
        local=local_layers(model),
        states=states,
        cannot_prune=cannot_prune(model),
        cannot_record=cannot_record(model),
        cannot_show_queries=cannot_show_queries(model),
        group=process_group(model),
    )
    before = base.__dict__.get("_kvprune")
    if before is not None and before.says_the_same_as(attachment):
        # Caches that were used with the model know it by this object. What was found out about
        # the model may have changed since, as its weights may.
        attachment = before
        attachment.memory.clear()
    detach(model)
    _register_functions()
    base._kvprune = attachment
    if not has_own_attention(base):
        # Not what reads pictures.
        for config in _configs(base):
            config._attn_implementation = name_of(backend_of(config))
    hook_layers(base, layers, attentions)
    replace_method(base, "forward", forward_of_base)
    if makes_masks(model):
        replace_method(model.base_model, "forward", forward_around_base)
    if model is not base and model is not model.base_model:
        replace_method(model, "forward", forward_of_head)
    if hasattr(type(model), "generate"):
        replace_method(model, "generate", generate_with_cache)
    for part in {id(model): model, id(base): base}.values():
        for name, method in _METHODS.items():
            if hasattr(type(part), name):
                # Not a bound method: pickle would look that up by its name, on the class.
                part.__dict__[name] = partial(method, part)
    return given


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Takes back everything that `attach` did to a model; returns the same object."""
    given, model = model, unwrapped(model)
    for module in model.modules():
        remove_hooks(module)
        restore_methods(module, _REPLACED)
        module.__dict__.pop("_kvprune", None)
        for name, method in _METHODS.items():
            if getattr(module.__dict__.get(name), "func", None) is method:
                del module.__dict__[name]
    for config in _configs(model):
        if str(config._attn_implementation).startswith(PREFIX):
            config._attn_implementation = backend_of(config)
    return given


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every config among the model's modules, once (they mostly share one)."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return (c for c in found.values() if hasattr(c, "_attn_implementation"))


def _register_functions() -> None:
    """Global in transformers, but stateless and inert for models that do not name them."""
    for backend in BACKENDS:
        ALL_ATTENTION_FUNCTIONS.register(PREFIX + backend, partial(slot_attention, backend))
        stock = ALL_MASK_ATTENTION_FUNCTIONS[backend]
        ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + backend, partial(mask_or_rule, stock))


def _replicate_for_data_parallel(module: Any) -> Any:
    """A replica has the methods of its class, as ours would run the module that it was made of."""
    replica = type(module)._replicate_for_data_parallel(module)
    restore_methods(replica, _REPLACED)
    for name in _METHODS:
        replica.__dict__.pop(name, None)
    return replica


_REPLACED = (forward_around_base, forward_of_base, forward_of_head, generate_with_cache)

_METHODS: dict[str, Callable[..., Any]] = {
    "_replicate_for_data_parallel": _replicate_for_data_parallel,
    "generate_batch": generate_batch,
    "_prepare_cache_for_generation": prepare_cache_for_generation,
    "_get_stopping_criteria": get_stopping_criteria,
    "_get_logits_processor": get_logits_processor,
}
