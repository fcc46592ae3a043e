"""The methods of an attached model around one `generate` with a cache of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from ..cache.composed import ComposedCache
from ..cache.endings import Endings, PadsEnded, WatchedCriteria, watch, watching
from ..errors import KVPruneError
from ..models.families import drops_cache_beyond
from ..models.releases import GenerationMode, chunks_begin_anew, generate_cache_name, noted, renamed
from ..models.structure import base_of
from .methods import method_of


def generate_with_cache(
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
    generate = method_of(model, "generate", inner)
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
                f"attention_mask: expected shape [{tokens.shape[0]}, columns], got "
                f"{list(mask.shape)}"
            )
        columns = mask.shape[1]
    # Embeddings are taken to be those of all tokens, whatever the mask says.
    if (columns == count or embeds is not None) and count <= cache.seen:
        raise KVPruneError(
            f"the prompt has {count} tokens, but the cache has seen {cache.seen} columns: "
            f"expected all tokens so far and at least a new one, or new ones alone with an "
            f"attention_mask over all {cache.seen} + {count} columns"
        )
    if columns not in (count, cache.seen + count):
        raise KVPruneError(
            f"attention_mask: expected {count} columns (the ids are all tokens so far) or "
            f"{cache.seen} + {count} (they are new), got {columns}"
        )
    if columns == count and tokens is not None and tokens.dim() == 2:
        cache.check_prompt_ids(tokens, mask)


def prepare_cache_for_generation(
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
            f"expected at most {limit} tokens with the new ones, got up to {length}. Lower "
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
    """The watcher of rows that end; None where `generate` pads none.

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


def get_stopping_criteria(model: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
    """The stopping criteria, whose answers are also noted."""
    criteria = type(model)._get_stopping_criteria(model, generation_config, *args, **kwargs)
    endings = watching(generation_config)
    if endings is None:
        return criteria
    # What generate itself asks: an eos may also be that of a criterion of the user's.
    endings.appended = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    # Where nothing is appended, rows go on with tokens of their own.
    noted_at_all = endings.appended or endings.before is not None
    return WatchedCriteria(criteria, endings) if noted_at_all else criteria


def get_logits_processor(model: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
    """The logits processors, and one that leaves rows which had ended padding alone."""
    processors = type(model)._get_logits_processor(model, generation_config, *args, **kwargs)
    endings = watching(generation_config)
    if endings is not None and endings.before is not None:
        processors.append(PadsEnded(endings.before, endings.pad))
    return processors


def generate_batch(model: Any, *args: Any, **kwargs: Any) -> Any:
    raise KVPruneError(
        "generate_batch has a paged cache of its own, which policies cannot reach: use "
        "generate, or kvprune.detach(model) first"
    )
