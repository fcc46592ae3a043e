"""Wires a model: hooks, `generate(cache=...)`, attention and masks. Decides nothing.

Every hook is a module-level callable and finds the cache among the arguments of the call, so
a model holds no state of a sequence, can be deep-copied and pickled, and serves any number
of caches and threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import name_of, shown, slot_attention
from .binding import Attachment
from .cache import ComposedCache
from .errors import KVPruneError
from .families import (
    BACKENDS,
    CACHE_ARGUMENTS,
    POSITION_ARGUMENTS,
    PREFIX,
    argument,
    attention_of,
    backend_of,
    base_of,
    cannot_prune,
    cannot_record,
    check_family,
    decoder_layers,
    drops_cache_beyond,
    has_own_attention,
    keeps_keywords,
    linear_layers,
    local_layers,
    lost_keyword,
    takes,
    unwrapped,
    with_argument,
)
from .masks import mask_or_rule
from .own_attention import at_slots, observe
from .parallel import process_group

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


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
    check_family(model)
    base: Any = base_of(model)
    layers = decoder_layers(base)
    states = linear_layers(model)
    attentions = [
        None if linear else attention_of(base, layer)
        for layer, linear in zip(layers, states, strict=True)
    ]
    heads = base.config.get_text_config(decoder=True).num_attention_heads
    attachment = base.__dict__.get("_kvprune") or Attachment(
        type(model).__name__,
        len(layers),
        heads,
        local=local_layers(model),
        states=states,
        cannot_prune=cannot_prune(model),
        cannot_record=cannot_record(model),
        group=process_group(model),
    )
    detach(model)
    _register_functions()
    base._kvprune = attachment
    if not has_own_attention(base):
        for config in _configs(model):
            config._attn_implementation = name_of(backend_of(config))
    _hook_base(base, layers, attentions)
    if model is not base:
        model.register_forward_pre_hook(_before_head_model, with_kwargs=True)
        model.register_forward_hook(_after_head_model, with_kwargs=True, always_call=True)
    for name, method in _METHODS.items():
        if hasattr(type(model), name):
            # Not a bound method: pickle would look that up by its name, on the class.
            model.__dict__[name] = partial(method, model)
    return given


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Takes back everything that `attach` did to a model; returns the same object."""
    given, model = model, unwrapped(model)
    for module in model.modules():
        _remove_hooks(module)
        module.__dict__.pop("_kvprune", None)
    for name in _METHODS:
        if getattr(model.__dict__.get(name), "func", None) is _METHODS[name]:
            del model.__dict__[name]
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


def _hook_base(base: nn.Module, layers: Any, attentions: list[nn.Module | None]) -> None:
    base.register_forward_pre_hook(_before_base, with_kwargs=True)
    base.register_forward_hook(_after_base, with_kwargs=True, always_call=True)
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


def _remove_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            function = hook.func if isinstance(hook, partial) else hook
            if function in _HOOKS:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


def _cache_in(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ComposedCache | None:
    """The cache of this call, if it is one of ours."""
    for name in CACHE_ARGUMENTS:
        # No module has both; models that are used without a cache of ours come here, too.
        if name in kwargs:
            return kwargs[name] if isinstance(kwargs[name], ComposedCache) else None
    for name in CACHE_ARGUMENTS:
        cache = argument(module, args, kwargs, name)
        if isinstance(cache, ComposedCache):
            return cache
    return None


# The hooks, in the order in which a forward meets them.


def _before_head_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = _cache_in(model, args, kwargs)
    if cache is None:
        return
    prunes = any("rank_hidden" in p.hooks for p in cache.policies)
    if prunes and argument(model, args, kwargs, "labels") is not None:
        raise KVPruneError(
            "labels with a policy that prunes hidden states: dropped tokens leave the model "
            "early, so a loss over all tokens would be wrong. Take the logits of the tokens in "
            "question through logits_to_keep and compute the loss from those"
        )
    asked = argument(model, args, kwargs, "logits_to_keep")
    cache.ask_logits(0 if asked is None else asked)


def _after_head_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    cache = _cache_in(model, args, kwargs)
    if cache is not None:
        cache.ask_logits(None)


def _before_base(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    cache = _cache_in(base, args, kwargs)
    if cache is None:
        return None
    try:
        _open_step(cache, base, args, kwargs)
    except Exception:
        cache.refuse_step()
        raise
    positions = cache.step.position_ids
    if positions is None or not takes(base, "position_ids"):
        return None
    return with_argument(base, args, kwargs, "position_ids", positions)


def _open_step(
    cache: ComposedCache, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    _check_forward(base, args, kwargs)
    cache.bind(base._kvprune, base)
    asks_probabilities = argument(base, args, kwargs, "output_attentions")
    if asks_probabilities is None:
        asks_probabilities = base.config.output_attentions
    if asks_probabilities and cache.attends_in_pieces:
        raise KVPruneError(
            "output_attentions=True with a policy that observes attention, or with drafts and a "
            "policy that evicts: attention is computed piece by piece, and the probabilities are "
            "never there as a whole. Leave it out, or use policies without statistics"
        )
    tokens = argument(base, args, kwargs, "input_ids")
    if tokens is None:
        tokens = argument(base, args, kwargs, "inputs_embeds")
    if tokens is None:
        raise KVPruneError("a forward without tokens: expected input_ids or inputs_embeds")
    mask = argument(base, args, kwargs, "attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise KVPruneError(f"attention_mask: expected a tensor, came {type(mask).__name__}")
    cache.open_step(tokens.shape[0], tokens.shape[1], mask, tokens.device)
    if asks_probabilities:
        cache.step.attended = {}


def _check_forward(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if argument(base, args, kwargs, "use_cache") is False:
        raise KVPruneError("use_cache=False with a ComposedCache: leave out one of the two")
    if base.training and base.is_activation_checkpointing:
        raise KVPruneError(
            "gradient checkpointing in training hides the cache from the layers: call "
            "model.activation_checkpointing_disable() or model.eval() first"
        )
    wired = str(base.config._attn_implementation).startswith(PREFIX)
    if not wired and not has_own_attention(base):
        raise KVPruneError(
            f"the attention implementation became {base.config._attn_implementation!r} after "
            f"attach: call kvprune.attach(model) again"
        )


def _before_layer(
    index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    cache = _cache_in(layer, args, kwargs)
    if cache is None:
        return None
    # Layers hand keywords that they do not know on to their attention.
    args, kwargs = _enter(cache, index, layer, args, kwargs)
    return args, {**kwargs, "kvprune_layer": cache.hand_out(index)}


def _before_attention(
    index: int, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    """Of a decoder layer that hands no keywords on."""
    cache = _cache_in(attention, args, kwargs)
    return None if cache is None else (args, {**kwargs, "kvprune_layer": cache.hand_out(index)})


def _enter(
    cache: ComposedCache,
    index: int,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Arguments:
    """A layer's arguments, gathered to the tokens that enter it."""
    step = cache.step
    if not step.prunes:
        return args, kwargs
    hidden = step.enter(index, argument(layer, args, kwargs, "hidden_states"))
    args, kwargs = with_argument(layer, args, kwargs, "hidden_states", hidden)
    for name in POSITION_ARGUMENTS:
        value = argument(layer, args, kwargs, name)
        if value is not None:
            aligned = step.align(value, hidden.device)
            args, kwargs = with_argument(layer, args, kwargs, name, aligned)
    return args, kwargs


def _before_linear_layer(
    index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    cache = _cache_in(layer, args, kwargs)
    if cache is None or not cache.step.prunes:
        return None
    arguments = _enter(cache, index, layer, args, kwargs)
    # Here the mask is `[B, Q]`, or None for no padding. What fills shorter rows is masked too.
    mask = None if cache.step.complete else cache.step.columns >= 0
    return with_argument(layer, *arguments, "attention_mask", mask)


def _before_bare_layer(
    index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    """Of one whose attention is handed by a hook of its own what it needs."""
    cache = _cache_in(layer, args, kwargs)
    return None if cache is None else _enter(cache, index, layer, args, kwargs)


def _before_own_attention(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    cache = _cache_in(attention, args, kwargs)
    if cache is None:
        return None
    return at_slots(attention, args, kwargs, cache.at_layer(attention.layer_idx))


def _after_own_attention(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    cache = _cache_in(attention, args, kwargs)
    if cache is None:
        return None
    layer = cache.at_layer(attention.layer_idx)
    observe(layer, output[1])
    output = (output[0], shown(layer, output[1]), *output[2:])
    layer.step.evict(layer)
    return output


def _after_last_layer(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    cache = _cache_in(layer, args, kwargs)
    if cache is None:
        return None
    if cache.step.unattended:
        raise lost_keyword(layer)
    if isinstance(output, tuple):
        return (cache.step.leave(output[0]), *output[1:])
    return cache.step.leave(output)


def _after_base(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    cache = _cache_in(base, args, kwargs)
    if cache is not None:
        cache.close_step(done=output is not None)


_HOOKS = (
    _before_head_model,
    _after_head_model,
    _before_base,
    _after_base,
    _before_layer,
    _before_linear_layer,
    _before_bare_layer,
    _before_attention,
    _before_own_attention,
    _after_own_attention,
    _after_last_layer,
)


# What an attached model does instead of its class's methods.


def _generate(model: Any, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
    """`generate` with one more argument, `cache`: a `ComposedCache`, or what makes one.

    A callable is called once for each `generate`, which is what a pipeline needs: it hands the
    same arguments to every prompt.
    """
    if cache is not None:
        if kwargs.get("past_key_values") is not None:
            raise KVPruneError(
                "generate: cache= and past_key_values= were both given: leave out one"
            )
        kwargs["past_key_values"] = _given_cache(cache)
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, ComposedCache):
        return type(model).generate(model, *args, **kwargs)
    base = base_of(model)
    attachment = base.__dict__.get("_kvprune")
    if attachment is None:
        raise KVPruneError(
            "the base model was detached by itself: call kvprune.attach(model) again"
        )
    cache.bind(attachment, base)
    mask = _whole_mask(cache, *args, **kwargs)
    if mask is not None:
        kwargs["attention_mask"] = mask
    _check_prompt(cache, *args, **kwargs)
    cache.enter_generate()
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        cache.leave_generate()


def _given_cache(cache: Any) -> ComposedCache:
    # A class is a forgotten pair of brackets.
    makes = callable(cache) and not isinstance(cache, type)
    given = cache() if makes else cache
    if not isinstance(given, ComposedCache):
        what = ("a callable that returned " if makes else "") + type(given).__name__
        raise KVPruneError(
            f"generate: cache= expects a ComposedCache, or a callable without arguments that "
            f"makes one (cache=lambda: ComposedCache([H2O()])), came {what}"
        )
    return given


def _prompt_of(inputs: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """Ids `[B, count]` or embeddings `[B, count, C]`, however they were passed."""
    given = (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids"))
    return next((t for t in given if t is not None), None)


def _whole_mask(
    cache: ComposedCache, inputs: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor | None:
    """The mask that was given; one of earlier turns with ones for what it does not reach.

    It is one where it ends before ids that are all tokens so far do, or, with new ids alone,
    within what the cache has seen. Any other mask that does not fit is left to be refused.
    """
    tokens, mask = _prompt_of(inputs, kwargs), kwargs.get("attention_mask")
    if tokens is None or mask is None or mask.dim() != 2 or cache.seen == 0:
        return mask
    count, columns, missing = tokens.shape[1], mask.shape[1], 0
    if columns < count and cache.seen < count:
        missing = count - columns
    elif count < columns <= cache.seen:
        missing = cache.seen + count - columns
    return nn.functional.pad(mask, (0, missing), value=1)


def _check_prompt(
    cache: ComposedCache, inputs: Tensor | None = None, *args: Any, **kwargs: Any
) -> None:
    """A prompt is all ids so far, or new ids with a mask over all columns."""
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    tokens = _prompt_of(inputs, kwargs)
    # Without a prompt `generate` begins with one begin-of-sequence token.
    count = columns = 1 if tokens is None else tokens.shape[1]
    if mask is not None and tokens is not None:
        if mask.dim() != 2 or mask.shape[0] != tokens.shape[0]:
            raise KVPruneError(
                f"attention_mask: expected shape [{tokens.shape[0]}, columns], came "
                f"{list(mask.shape)}"
            )
        columns = mask.shape[1]
    # Embeddings are taken to be those of all tokens, whatever the mask says.
    if (columns == count or embeds is not None) and count <= cache.seen:
        raise KVPruneError(
            f"the prompt has {count} tokens, but the cache has seen {cache.seen} columns: "
            f"expected all tokens so far and new ones, or new ones alone with an attention_mask "
            f"over all {cache.seen} + {count} columns"
        )
    if columns not in (count, cache.seen + count):
        raise KVPruneError(
            f"attention_mask: expected {count} columns (the ids are all tokens so far) or "
            f"{cache.seen} + {count} (they are new), came {columns}"
        )


def _prepare_cache_for_generation(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """The place where `generate` knows the prompt's mask and mode, and has run nothing yet."""
    prepare = type(model)._prepare_cache_for_generation
    cache = model_kwargs.get("past_key_values")
    if isinstance(cache, ComposedCache):
        _check_generation(cache, generation_config, *args, **kwargs)
        _check_chunks(generation_config.prefill_chunk_size, model_kwargs.get("inputs_embeds"))
        _check_length(cache, drops_cache_beyond(model), generation_config.max_length)
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            length = generation_config._mask_length
            cache.announce_prompt(length - cache.seen, length)
        else:
            _check_ends(mask)
            cache.announce_prompt(mask[:, cache.seen :].bool().sum(-1), mask.shape[1])
    return prepare(model, generation_config, model_kwargs, *args, **kwargs)


def _check_generation(
    cache: ComposedCache, generation_config: Any, generation_mode: Any, *_: Any, **__: Any
) -> None:
    if generation_config.use_cache is False:
        raise KVPruneError("use_cache=False with a ComposedCache: leave out one of the two")
    if "assisted" in str(generation_mode).lower() and cache.seen:
        raise KVPruneError(
            f"assisted and prompt-lookup decoding go wrong in transformers with a cache that is "
            f"not empty (this one has seen {cache.seen} columns): use a new ComposedCache and hand "
            f"in all tokens, or leave out assistant_model and prompt_lookup_num_tokens"
        )


def _check_chunks(size: int | None, embeds: Tensor | None) -> None:
    if size is not None and embeds is not None:
        raise KVPruneError(
            f"prefill_chunk_size={size} with inputs_embeds: this release of transformers cuts ids "
            f"into chunks, not embeddings. Leave out prefill_chunk_size, or call the model's "
            f"forward with the cache on one piece of the embeddings after the other"
        )


def _check_length(cache: ComposedCache, limit: int | None, length: int | None) -> None:
    if limit is not None and length is not None and cache.seen <= limit < length:
        raise KVPruneError(
            f"this model's generate drops its cache beyond {limit} columns, as its RoPE changes: "
            f"expected at most {limit} tokens with the new ones, came up to {length}. Lower "
            f"max_new_tokens, or call the model's forward in a loop of your own"
        )


def _check_ends(mask: Tensor) -> None:
    if bool((mask[:, -1] == 0).any()):
        rows = (mask[:, -1] == 0).nonzero().flatten().tolist()
        raise KVPruneError(
            f"the prompt is padded on the right, or empty, in rows {rows}: expected left "
            f"padding. Set tokenizer.padding_side = 'left'"
        )


def _generate_batch(model: Any, *args: Any, **kwargs: Any) -> Any:
    raise KVPruneError(
        "generate_batch has a paged cache of its own, which policies cannot reach: use "
        "generate, or kvprune.detach(model) first"
    )


_METHODS = {
    "generate": _generate,
    "generate_batch": _generate_batch,
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
}
