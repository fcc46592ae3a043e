"""The small table of what differs between model families, and who is refused.

Everything here is read off a model once, by `attach`.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import KVPruneError
from .backends import BACKENDS, FLASH, backend_of, flash_attn_func
from .releases import CACHE_ARGUMENTS, layer_types
from .structure import (
    Local,
    base_of,
    check_kind,
    decoder_layers,
    sees_pictures,
    unsupported,
)

NOT_PER_TOKEN = {"hidden_states", "attention_mask", "alibi", *CACHE_ARGUMENTS}
"""Arguments of layers that are gathered to the tokens that are left elsewhere, or not at all.

Whatever else decoder layers are handed and has the length of the tokens is gathered before each.
"""


ATTENTION = ("self_attn", "self_attention", "attention", "attn")


OWN_ATTENTION = {"bloom", "falcon"}
"""Families whose modules compute attention by themselves (see `own_attention`)."""


KEEPS_KEYWORDS = {"stablelm", "nemotron"}
"""Families whose decoder layers hand keywords that they do not know on to nobody."""


TILES_HEADS = {"JetMoeAttention"}
"""Attention that repeats its key/value heads as a whole, one copy after the other.

Query head i then reads key/value head i modulo their number, and not its neighbours' one. By the
name of the class, since every layer asks in every step.
"""


REFUSED = {
    "gemma3n_text": "its layers share keys and values, and hand on several hidden states per "
    "token, with an input per layer beside them",
    "diffllama": "its heads are paired in attention, while each keeps slots of its own",
    "dory": "its layers run several times in a forward, and store keys and values the last time "
    "alone",
    "doge": "its attention computes a mask of its own",
    "recurrent_gemma": "its recurrent layers cannot leave tokens out",
}


CANNOT_PRUNE = {
    "llama4_text": "its attention scales queries by positions that it counts from the cache "
    "itself, as if no token had been left out",
}
"""Families whose slots can be evicted, but whose hidden states cannot be pruned."""


HYBRID = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"}
"""Families some of whose layers keep a state instead of slots, and take tokens left out."""


SEES_PICTURES = {"llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "smolvlm"}
"""Families of vision-language models that kvprune was tried with."""


MASKS_AROUND = {"gemma3"}
"""Of these, the families that make masks before their language model runs."""


DROPS_CACHE = {"phi3", "phimoe", "phi4_multimodal"}


LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def attention_of(base: PreTrainedModel, layer: nn.Module) -> nn.Module:
    """The self-attention of a decoder layer.

    Raises:
        KVPruneError: there is none, or it cannot be handed one more keyword.
    """
    for name in ATTENTION:
        module = getattr(layer, name, None)
        # GPT-2 and its like nest: the module that knows its layer is the one.
        if isinstance(module, nn.Module) and getattr(module, "layer_idx", None) is not None:
            _check_keywords(base, layer, module)
            return module
    raise unsupported(base, f"{type(layer).__name__} has no self-attention with a layer_idx")


def _check_keywords(base: Any, *modules: nn.Module) -> None:
    """Refuses a layer or an attention to which a keyword of ours cannot be handed."""
    for module in modules:
        kind: Any = type(module)
        if not has_own_attention(base) and not _takes_keywords(kind):
            raise unsupported(base, f"{kind.__name__} takes no further keywords")


def has_own_attention(base: Any) -> bool:
    """Whether the model's attention goes past AttentionInterface, in a way that is known."""
    return base.config.model_type in OWN_ATTENTION


def keeps_keywords(base: Any) -> bool:
    """Whether a keyword has to be handed to the model's attention past its decoder layer."""
    return base.config.model_type in KEEPS_KEYWORDS


def copies_of_heads(attention: Any) -> int:
    """The number of copies of an attention module's key/value heads as a whole; mostly 1."""
    if type(attention).__name__ not in TILES_HEADS:
        return 1
    config = attention.config
    return int(config.num_attention_heads) // int(config.num_key_value_heads)


def lost_keyword(module: nn.Module) -> KVPruneError:
    """The error that refuses a model whose attention never got what its layer was handed."""
    return KVPruneError(
        f"{type(module).__name__}: attention was not handed the keyword kvprune_layer that its "
        f"decoder layer was given: expected a model whose decoder layers hand further keywords on "
        f"to their attention. Call kvprune.attach(model) again if a layer was replaced; otherwise "
        f"this family is not supported. reset() makes the cache usable again"
    )


def has_alibi(base: Any) -> bool:
    """Whether the model knows positions by a bias of distances alone: BLOOM.

    Not Falcon: its ALiBi is made in bfloat16, so that from column 256 on neighbours share a bias
    and what a query sees depends on where in the text it stands.
    """
    return str(base.config.model_type) == "bloom"


def makes_masks(model: PreTrainedModel) -> bool:
    """Whether the model makes masks itself, before its language model runs."""
    return sees_pictures(model) and model.config.model_type in MASKS_AROUND


def drops_cache_beyond(model: Any) -> int | None:
    """The columns beyond which the model's `generate` begins anew without its cache.

    Phi-3 and its like do so where their LongRoPE changes its frequencies.
    """
    config = model.config
    limit = getattr(config, "original_max_position_embeddings", None)
    return int(limit) if limit and config.model_type in DROPS_CACHE else None


def check_family(model: PreTrainedModel) -> None:
    """Refuses a model whose layers kvprune cannot follow, by name and with the reason.

    Raises:
        KVPruneError: see above.
    """
    check_kind(model)
    config: Any = model.config
    base: Any = base_of(model)
    if config.is_encoder_decoder:
        raise unsupported(model, "encoder-decoder models have a second cache, of the encoder")
    for kind in (config.model_type, config.get_text_config(decoder=True).model_type):
        if kind in REFUSED:
            raise unsupported(model, REFUSED[kind])
    if sees_pictures(model) and config.model_type not in SEES_PICTURES:
        raise unsupported(
            model,
            f"of models that see pictures, only {', '.join(sorted(SEES_PICTURES))} are known. "
            f"Attach the language model within by itself (attention must be causal there)",
        )
    if not base._can_set_attn_implementation() and not has_own_attention(base):
        raise unsupported(model, "its attention does not go through AttentionInterface")
    if getattr(config, "reorder_and_upcast_attn", False):
        raise unsupported(model, "reorder_and_upcast_attn goes by the name of its attention")
    _check_layer_types(model)
    _check_backend(model, backend_of(config), has_own_attention(base))
    _check_capping(model, backend_of(config))


def _check_backend(model: PreTrainedModel, backend: str, own_attention: bool) -> None:
    if backend == FLASH:
        flash_attn_func()
    if backend not in BACKENDS or (backend == FLASH and own_attention):
        others = "" if own_attention else f", or {FLASH!r} with the package flash-attn"
        raise unsupported(
            model,
            f"its attention implementation is {backend!r}; load it with "
            f"attn_implementation='sdpa' or 'eager'{others}",
        )


def _check_capping(model: PreTrainedModel, backend: str) -> None:
    config: Any = model.config.get_text_config(decoder=True)
    if backend == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None:
        raise unsupported(
            model,
            "its scores are soft-capped, which sdpa leaves out; load it with "
            "attn_implementation='eager'",
        )


def _check_layer_types(model: PreTrainedModel) -> None:
    config: Any = model.config.get_text_config(decoder=True)
    try:
        types, _ = layer_types(config)
    except Exception as error:
        raise unsupported(model, f"its layer types cannot be read ({error})") from error
    # The decoder of an encoder-decoder model by itself: transformers makes its caches by the
    # encoder's number of layers.
    count = getattr(config, "decoder_layers", 0)
    if count > len(types):
        raise unsupported(model, f"it has {count} decoder layers, and caches for {len(types)}")
    if "dummy" in types:
        raise unsupported(model, "some of its layers have no keys and values of their own")
    known = LAYER_TYPES | {"linear_attention"} if is_hybrid(model) else LAYER_TYPES
    strange = sorted(set(types) - known)
    if strange:
        raise unsupported(model, f"it has layers of type {', '.join(strange)}")


def _layer_kinds(model: PreTrainedModel) -> tuple[list[str], list[dict[str, Any]]]:
    """The type of each decoder layer, and the options of its cache in transformers."""
    types, options = layer_types(model.config.get_text_config(decoder=True))
    count = len(decoder_layers(base_of(model)))
    return types[:count], options[:count]


def local_layers(model: PreTrainedModel) -> tuple[Local | None, ...]:
    """The part of the text that each layer's queries can see; None for all of it."""
    types, options = _layer_kinds(model)
    sizes = [option.get("sliding_window") for option in options]
    return tuple(
        None if size is None else Local(size, chunked=kind == "chunked_attention")
        for kind, size in zip(types, sizes, strict=True)
    )


def is_hybrid(model: PreTrainedModel) -> bool:
    """Whether some layers keep a state instead of slots."""
    return model.config.get_text_config(decoder=True).model_type in HYBRID


def linear_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """The number of states that each layer keeps instead of slots; 0 for layers with slots."""
    types, options = _layer_kinds(model)
    return tuple(
        option["number_of_states"] if kind == "linear_attention" else 0
        for kind, option in zip(types, options, strict=True)
    )


def cannot_prune(model: PreTrainedModel) -> str:
    """Why no policy may prune this model's hidden states; empty where one may."""
    config: Any = model.config.get_text_config(decoder=True)
    return CANNOT_PRUNE.get(config.model_type, "")


def cannot_record(model: PreTrainedModel) -> str:
    """Why this model's caches cannot take drafts back; empty where they can."""
    if any(linear_layers(model)):
        return "the states of its linear-attention layers cannot go back"
    if getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None):
        return "its latent keys and values (MLA) are expanded after they were stored"
    if has_own_attention(base_of(model)):
        return "its attention takes all new tokens at once, with nothing evicted in between"
    return ""


def head_sizes(base: Any) -> tuple[int, ...]:
    """The numbers of stored keys and values, of all layers, as far as the model says them."""
    config = base.config.get_text_config(decoder=True)
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        return int(latent), int(config.qk_rope_head_dim)
    modules = (getattr(layer, name, None) for layer in decoder_layers(base) for name in ATTENTION)
    sizes = (getattr(m, name, None) for m in modules for name in ("head_dim", "head_size"))
    return tuple(dict.fromkeys(size for size in sizes if isinstance(size, int)))


def hands_on_what_is_stored(base: Any) -> bool:
    """Whether attention is handed the keys and values that the cache returned, as they are."""
    latent = getattr(base.config.get_text_config(decoder=True), "kv_lora_rank", None)
    return not latent and not has_own_attention(base)


def cannot_show_queries(model: PreTrainedModel) -> str:
    """Why a layer's queries cannot be seen; empty where they can."""
    if has_own_attention(base_of(model)):
        return "its attention modules make queries and use them by themselves"
    return ""


@cache
def _takes_keywords(module: Any) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())
