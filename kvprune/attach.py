"""Wires a model: hooks, `generate(cache=...)`, attention and masks. Decides nothing.

Every hook is a module-level callable and finds the cache among the arguments of the call, so
a model holds no state of a sequence, can be deep-copied and pickled, and serves any number
of caches and threads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .attention import name_of, shown, slot_attention
from .binding import Attachment
from .cache import ComposedCache
from .endings import Endings, PadsEnded, WatchedCriteria, watch, watching
from .errors import KVPruneError
from .families import (
    BACKENDS,
    NOT_PER_TOKEN,
    PREFIX,
    argument,
    arguments_given,
    attention_of,
    backend_of,
    base_of,
    cannot_prune,
    cannot_record,
    check_family,
    check_kind,
    decoder_layers,
    drops_cache_beyond,
    has_own_attention,
    keeps_keywords,
    linear_layers,
    local_layers,
    lost_keyword,
    query_heads,
    takes,
    unwrapped,
    with_argument,
)
from .masks import mask_or_rule
from .own_attention import at_slots, observe
from .parallel import process_group
from .releases import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    CACHE_ARGUMENTS,
    GenerationMode,
    cache_name,
    check_model,
    check_release,
    checkpointing_off,
    checkpoints_activations,
    chunks_begin_anew,
    generate_cache_name,
    noted,
    renamed,
)
from .step import Step

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
        for config in _configs(model):
            config._attn_implementation = name_of(backend_of(config))
    _hook_layers(base, layers, attentions)
    _replace(base, "forward", _forward_of_base)
    if model is not base:
        _replace(model, "forward", _forward_of_head)
    if hasattr(type(model), "generate"):
        _replace(model, "generate", _generate)
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
        _remove_hooks(module)
        _restore(module)
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


def _replace(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Puts one of our functions in the place of a module's method.

    `forward` has no hook instead: `module.forward(...)`, as PEFT and compiled code call it, goes
    past hooks.

    Args:
        module: the model, or its base model.
        name: of the method.
        function: is called with the module, what stood on the module itself in place of the
            method of its class (None for nothing), and the arguments of the call.
    """
    # accelerate puts its own forward there, and a model with a custom_generate its own generate.
    inner = module.__dict__.get(name)
    ours = partial(function, module, inner)
    # generate and pipelines read off the signature what a model takes. Without annotations, which
    # not every pickle can hold.
    signature = inspect.signature(_method(module, name, inner))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    ours.__dict__["__signature__"] = inspect.Signature(bare)
    # A partial has no name and no docstring of its own.
    replaced = inner or getattr(type(module), name)
    for said in ("__module__", "__name__", "__qualname__", "__doc__"):
        if hasattr(replaced, said):
            ours.__dict__[said] = getattr(replaced, said)
    module.__dict__[name] = ours


def _restore(module: nn.Module) -> None:
    """Takes back what `_replace` did, also where accelerate has wrapped it since."""
    for name in ("forward", "_old_forward", "generate"):
        ours: Any = module.__dict__.get(name)
        if hasattr(ours, "_torchdynamo_orig_callable"):
            # What the user compiled in place of the method stands around ours.
            ours = inspect.unwrap(ours)
        if getattr(ours, "func", None) not in (_forward_of_base, _forward_of_head, _generate):
            continue
        inner = ours.args[1]
        if name == "_old_forward":
            module.__dict__[name] = _method(module, "forward", inner)
        elif inner is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = inner


def _method(module: nn.Module, name: str, inner: Callable[..., Any] | None) -> Callable[..., Any]:
    """What one of our functions calls: what it replaced, or the method of the module's class."""
    # Not a bound method: pickle would look that up by its name, and find our function.
    return inner or partial(getattr(type(module), name), module)


def _hook_layers(base: nn.Module, layers: Any, attentions: list[nn.Module | None]) -> None:
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
        # A module has only one of these names. Calls without a cache of ours come here, too.
        if name in kwargs:
            return kwargs[name] if isinstance(kwargs[name], ComposedCache) else None
    for name in CACHE_ARGUMENTS:
        cache = argument(module, args, kwargs, name)
        if isinstance(cache, ComposedCache):
            return cache
    return None


# The forwards of the model and of its base model.


def _forward_of_head(
    model: nn.Module, inner: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    """The forward of a model with a head: says which logits are asked for, before the base runs.

    Args:
        model: the model.
        inner: what was the model's own forward; None for the one of its class.
        args, kwargs: of the call.
    """
    forward = _method(model, "forward", inner)
    kwargs = renamed(kwargs, cache_name(model))
    cache = _cache_in(model, args, kwargs)
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


def _forward_of_base(
    base: nn.Module, inner: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    """The forward of the model that has the decoder layers: one step of the cache.

    Args:
        base: the model.
        inner: what was the model's own forward; None for the one of its class.
        args, kwargs: of the call.
    """
    forward = _method(base, "forward", inner)
    kwargs = renamed(kwargs, cache_name(base))
    cache = _cache_in(base, args, kwargs)
    if cache is None:
        return forward(*args, **kwargs)
    tokens, asks_probabilities = _open_step(cache, base, args, kwargs)
    done = False
    try:
        if tokens.dim() == 2:
            cache.note_ids(tokens)
        if asks_probabilities:
            cache.step.attended = {}
        positions = cache.step.position_ids
        if positions is not None and takes(base, "position_ids"):
            args, kwargs = with_argument(base, args, kwargs, "position_ids", positions)
        output = forward(*args, **kwargs)
        done = True
    finally:
        cache.close_step(done)
    return output


def _open_step(
    cache: ComposedCache, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, bool]:
    """Begins a step; the forward's ids or embeddings, and whether it is asked for attentions."""
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
    return tokens, bool(asks_probabilities)


def _check_forward(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    count, known = len(decoder_layers(base)), base._kvprune.num_layers
    if count != known:
        raise KVPruneError(
            f"the model had {known} decoder layers when kvprune was attached, and has {count} now: "
            f"call kvprune.attach(model) again, and use a new cache"
        )
    if argument(base, args, kwargs, "use_cache") is False:
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


# The hooks on decoder layers and their attention, in the order in which a forward meets them.


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
    """Pre-hook of the attention in a decoder layer that passes unknown keywords to nobody."""
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
    if not cache.step.prunes:
        return args, kwargs
    if torch.compiler.is_compiling():
        # What is asked there breaks the graph. Behind a break inside a hook, compiled code goes on
        # with the arguments that the hook was handed, not with those that it returns.
        return torch.compiler.disable(_gather)(cache.step, index, layer, args, kwargs)
    return _gather(cache.step, index, layer, args, kwargs)


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
    """Pre-hook of a decoder layer whose attention has a hook of its own."""
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


_HOOKS = (
    _before_layer,
    _before_linear_layer,
    _before_bare_layer,
    _before_attention,
    _before_own_attention,
    _after_own_attention,
    _after_last_layer,
)


# What an attached model does instead of its class's methods.


def _generate(
    model: Any,
    inner: Callable[..., Any] | None,
    *args: Any,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """`generate` whose cache may be a `ComposedCache`, or a callable that makes one.

    It is called `cache` or `past_key_values`, whatever this release of transformers says. A
    callable is called once for each `generate`, which is what a pipeline needs: it hands the
    same arguments to every prompt.
    """
    generate = _method(model, "generate", inner)
    name = generate_cache_name()
    kwargs = renamed(kwargs if cache is None else {**kwargs, "cache": cache}, name)
    given = kwargs.pop(name, None)
    if given is None:
        return generate(*args, **kwargs)
    held = _given_cache(given)
    if not isinstance(held, ComposedCache):
        return generate(*args, **kwargs, **{name: held})
    base = base_of(model)
    attachment = base.__dict__.get("_kvprune")
    if attachment is None:
        raise KVPruneError(
            "the base model was detached by itself: call kvprune.attach(model) again"
        )
    held.bind(attachment, base)
    mask = _whole_mask(held, *args, **kwargs)
    if mask is not None:
        kwargs["attention_mask"] = mask
    _check_prompt(held, *args, **kwargs)
    # In a function of the user's there may be another generate with the same cache.
    held.enter_generate(custom=inner is not None or kwargs.get("custom_generate") is not None)
    try:
        return generate(*args, **kwargs, **{name: held})
    finally:
        held.leave_generate()


def _given_cache(cache: Any) -> Cache:
    # A class is a forgotten pair of brackets.
    makes = callable(cache) and not isinstance(cache, type)
    given = cache() if makes else cache
    if not isinstance(given, Cache):
        what = ("a callable that returned " if makes else "") + type(given).__name__
        raise KVPruneError(
            f"generate: cache= expects a ComposedCache (or another cache of transformers), or a "
            f"callable without arguments that makes one (cache=lambda: ComposedCache([H2O()])), "
            f"got {what}"
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
    if columns == count and tokens is not None and tokens.dim() == 2:
        cache.check_prompt_ids(tokens, mask)


def _prepare_cache_for_generation(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """The place where `generate` knows the prompt's mask and mode, and has run nothing yet."""
    prepare = type(model)._prepare_cache_for_generation
    cache = model_kwargs.get(generate_cache_name())
    # A config that is handed on, as to a function of the user's, may name those of another one.
    watch(generation_config, None)
    if isinstance(cache, ComposedCache):
        _check_generation(cache, generation_config, *args, **kwargs)
        _check_chunks(
            cache, generation_config.prefill_chunk_size, model_kwargs.get("inputs_embeds")
        )
        _check_length(cache, drops_cache_beyond(model), generation_config.max_length)
        mask = model_kwargs.get("attention_mask")
        endings = _endings(cache, generation_config, mask, *args, **kwargs)
        watch(generation_config, endings)
        if mask is None:
            length = noted(generation_config, "_mask_length")
            cache.announce_prompt(length - cache.seen, length, endings)
        else:
            new = mask[:, cache.seen :].bool().sum(-1)
            cache.announce_prompt(new, mask.shape[1], endings)
    return prepare(model, generation_config, model_kwargs, *args, **kwargs)


def _check_generation(
    cache: ComposedCache, generation_config: Any, generation_mode: Any, *_: Any, **__: Any
) -> None:
    if generation_config.use_cache is False:
        raise KVPruneError("use_cache=False with a ComposedCache: leave out one of the two")
    if generation_mode == GenerationMode.ASSISTED_GENERATION and cache.seen:
        raise KVPruneError(
            f"assisted and prompt-lookup decoding go wrong in transformers with a cache that is "
            f"not empty (this one has seen {cache.seen} columns): use a new ComposedCache and hand "
            f"in all tokens, or leave out assistant_model and prompt_lookup_num_tokens"
        )


def _check_chunks(cache: ComposedCache, size: int | None, embeds: Tensor | None) -> None:
    if size is not None and cache.seen and chunks_begin_anew():
        raise KVPruneError(
            f"prefill_chunk_size={size} with a cache that is not empty (this one has seen "
            f"{cache.seen} columns): this release of transformers counts chunks from 0, so their "
            f"masks and positions would be wrong. Leave out prefill_chunk_size, or install "
            f"transformers 5.21 or newer"
        )
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


def _endings(
    cache: ComposedCache,
    generation_config: Any,
    mask: Tensor | None,
    generation_mode: Any,
    *_: Any,
    **__: Any,
) -> Endings | None:
    """What watches for rows that end; None where `generate` pads none.

    Raises:
        KVPruneError: the prompt is padded on the right.
    """
    pad = noted(generation_config, "_pad_token_tensor")
    # Beams that have ended are replaced, and drafts are of one row.
    pads = pad is not None and generation_mode in (
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
    )
    ended = None if mask is None else mask[:, -1] == 0
    if ended is None or not bool(ended.any()):
        return Endings(pad) if pads else None
    assert mask is not None
    # A row of which nothing is asked had ended before: all that is new in it is padding.
    asked = mask[:, cache.seen :].any(-1)
    if cache.seen == 0 or not pads or bool((ended & asked).any()) or not bool(asked.any()):
        raise KVPruneError(
            f"the prompt is padded on the right, or empty, in rows "
            f"{ended.nonzero().flatten().tolist()}: expected left padding. Set "
            f"tokenizer.padding_side = 'left'. (Nothing new in some rows, which have ended, while "
            f"others go on, is fine where generate has a pad_token_id, without beams)"
        )
    return Endings(pad, ended)


def _get_stopping_criteria(model: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
    """What says which rows have ended is also noted."""
    criteria = type(model)._get_stopping_criteria(model, generation_config, *args, **kwargs)
    endings = watching(generation_config)
    if endings is None:
        return criteria
    # What generate itself asks: an eos may also be that of a criterion of the user's.
    endings.appended = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    # Where nothing is appended, rows go on with tokens of their own.
    noted_at_all = endings.appended or endings.before is not None
    return WatchedCriteria(criteria, endings) if noted_at_all else criteria


def _get_logits_processor(model: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Of rows that had ended before, `generate` says padding alone."""
    processors = type(model)._get_logits_processor(model, generation_config, *args, **kwargs)
    endings = watching(generation_config)
    if endings is not None and endings.before is not None:
        processors.append(PadsEnded(endings.before, endings.pad))
    return processors


def _generate_batch(model: Any, *args: Any, **kwargs: Any) -> Any:
    raise KVPruneError(
        "generate_batch has a paged cache of its own, which policies cannot reach: use "
        "generate, or kvprune.detach(model) first"
    )


def _replicate_for_data_parallel(module: Any) -> Any:
    """A replica has the methods of its class, as ours would run the module that it was made of."""
    replica = type(module)._replicate_for_data_parallel(module)
    _restore(replica)
    for name in _METHODS:
        replica.__dict__.pop(name, None)
    return replica


_METHODS: dict[str, Callable[..., Any]] = {
    "_replicate_for_data_parallel": _replicate_for_data_parallel,
    "generate_batch": _generate_batch,
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "_get_stopping_criteria": _get_stopping_criteria,
    "_get_logits_processor": _get_logits_processor,
}
