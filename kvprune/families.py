"""The small table of what differs between model families, and who is refused.

Everything here is read off a model once, by `attach`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from . import flash
from .errors import KVPruneError
from .masks import Local
from .releases import CACHE_ARGUMENTS, layer_types, parameters_of

NOT_PER_TOKEN = {"hidden_states", "attention_mask", "alibi", *CACHE_ARGUMENTS}
"""What is gathered to the tokens that are left elsewhere, or not at all.

Whatever else decoder layers are handed and has the length of the tokens is gathered before each.
"""

DECODER_LAYERS = ("layers", "h")
INNER_MODELS = ("model", "decoder")
"""Where some families keep the model that has the decoder layers, below their base model."""

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

DROPS_CACHE = {"phi3", "phimoe", "phi4_multimodal"}

LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
BACKENDS = ("sdpa", "eager", flash.NAME)


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model that has the decoder layers and is handed the cache; no head."""
    base: Any = model.base_model
    inner = [getattr(base, name, None) for name in INNER_MODELS]
    candidates = [base, *(m for m in inner if isinstance(m, PreTrainedModel))]
    found: PreTrainedModel = next((m for m in candidates if _layer_list(m) is not None), base)
    return found


def _layer_list(base: nn.Module) -> nn.ModuleList | None:
    lists = (getattr(base, name, None) for name in DECODER_LAYERS)
    return next((x for x in lists if isinstance(x, nn.ModuleList) and len(x)), None)


def decoder_layers(base: PreTrainedModel) -> Sequence[nn.Module]:
    """The decoder layers, in order.

    Raises:
        KVPruneError: the model has no such list.
    """
    layers = _layer_list(base)
    if layers is not None:
        return list(layers)[: base.config.num_hidden_layers]
    raise unsupported(base, f"it has no list of decoder layers named {' or '.join(DECODER_LAYERS)}")


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
        if not has_own_attention(base) and not _takes_keywords(_class(module)):
            raise unsupported(base, f"{type(module).__name__} takes no further keywords")


def has_own_attention(base: Any) -> bool:
    """Whether the model's attention goes past AttentionInterface, in a way that is known."""
    return base.config.model_type in OWN_ATTENTION


def keeps_keywords(base: Any) -> bool:
    """Whether a keyword has to be handed to the model's attention past its decoder layer."""
    return base.config.model_type in KEEPS_KEYWORDS


def copies_of_heads(attention: Any) -> int:
    """How often an attention module repeats its key/value heads as a whole; 1 if it does not."""
    if _class(attention).__name__ not in TILES_HEADS:
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


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other model as it is.

    PEFT's generate and forward hand everything on to the model inside.

    Raises:
        KVPruneError: prompt learning, which makes a cache or embeddings of its own.
    """
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise KVPruneError(
            f"attach: {type(model).__name__} with {type(model.active_peft_config).__name__}: it "
            f"puts virtual tokens before the prompt that no policy can tell from others. Expected "
            f"adapters in the layers, as LoRA"
        )
    return model.get_base_model()


def has_alibi(base: Any) -> bool:
    """Whether the model knows positions by a bias of distances alone: BLOOM.

    Not Falcon: its ALiBi is made in bfloat16, so that from column 256 on neighbours share a bias
    and what a query sees depends on where in the text it stands.
    """
    return str(base.config.model_type) == "bloom"


def drops_cache_beyond(model: Any) -> int | None:
    """The columns beyond which the model's `generate` begins anew without its cache.

    Phi-3 and its like do so where their LongRoPE changes its frequencies.
    """
    config = model.config
    limit = getattr(config, "original_max_position_embeddings", None)
    return int(limit) if limit and config.model_type in DROPS_CACHE else None


def takes(module: nn.Module, name: str) -> bool:
    """Whether `module`'s forward has an argument of that name."""
    return name in parameters_of(_class(module))


def check_kind(model: Any) -> None:
    """Refuses what is no model of transformers.

    Raises:
        KVPruneError: see above.
    """
    if not isinstance(model, PreTrainedModel):
        raise KVPruneError(
            f"attach: expected a transformers PreTrainedModel, got {type(model).__name__}"
        )


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
    if not base._can_set_attn_implementation() and not has_own_attention(base):
        raise unsupported(model, "its attention does not go through AttentionInterface")
    if getattr(config, "reorder_and_upcast_attn", False):
        raise unsupported(model, "reorder_and_upcast_attn goes by the name of its attention")
    _check_layer_types(model)
    _check_backend(model, backend_of(config), has_own_attention(base))
    _check_capping(model, backend_of(config))


def _check_backend(model: PreTrainedModel, backend: str, own_attention: bool) -> None:
    if backend == flash.NAME:
        flash.flash_attn_func()
    if backend not in BACKENDS or (backend == flash.NAME and own_attention):
        others = "" if own_attention else f", or {flash.NAME!r} with the package flash-attn"
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
    """By decoder layer, its type, and what transformers makes its cache with."""
    types, options = layer_types(model.config.get_text_config(decoder=True))
    count = len(decoder_layers(base_of(model)))
    return types[:count], options[:count]


def query_heads(base: Any) -> int:
    """How many query heads the model's attention has."""
    config = base.config.get_text_config(decoder=True)
    # In the config of an encoder-decoder model the usual name is that of the encoder's.
    return int(getattr(config, "decoder_attention_heads", config.num_attention_heads))


def local_layers(model: PreTrainedModel) -> tuple[Local | None, ...]:
    """By layer, what its queries can see; None for everything."""
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
    """By layer, how many states it keeps instead of slots; 0 for layers with slots."""
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


PREFIX = "kvprune_"


def backend_of(config: Any) -> str:
    """The attention implementation that a config names, without our prefix."""
    return str(config._attn_implementation or "eager").removeprefix(PREFIX)


def unsupported(model: nn.Module, reason: str) -> KVPruneError:
    """The error that refuses a family by name."""
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    return KVPruneError(
        f"{type(model).__name__} (model type {family!r}) is not supported: {reason}. Expected a "
        f"decoder-only model with plain or sliding-window attention in every layer"
    )


def _class(module: nn.Module) -> Any:
    return type(module)


@cache
def _takes_keywords(module: Any) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An argument of `module`'s forward by name, however it was passed; None if it was not."""
    if name in kwargs:
        return kwargs[name]
    names = parameters_of(_class(module))
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else None


def arguments_given(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments that `module`'s forward was handed, by name."""
    return {**dict(zip(parameters_of(_class(module)), args, strict=False)), **kwargs}


def with_argument(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` and `kwargs` with one argument replaced where it was passed."""
    names = parameters_of(_class(module))
    place = names.index(name) if name in names else len(args)
    if name not in kwargs and place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}
