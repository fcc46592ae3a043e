"""The small table of what differs between model families, and who is refused.

Everything here is read off a model once, by `attach`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from .errors import KVPruneError

CACHE_ARGUMENTS = ("past_key_values", "layer_past")
"""How modules call the cache: all say past_key_values but GPT-NeoX's layers."""

POSITION_ARGUMENTS = ("position_ids", "position_embeddings")
"""What decoder layers are handed per token, besides the hidden states."""

DECODER_LAYERS = ("layers", "h")
ATTENTION = ("self_attn", "attention", "attn")

REFUSED = {
    "gemma3n": "its layers share keys and values and keep states per layer input",
    "diffllama": "its heads are paired in attention, while each keeps slots of its own",
    "doge": "its attention computes a mask of its own",
    "recurrent_gemma": "its recurrent layers cannot leave tokens out",
}

LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
BACKENDS = ("sdpa", "eager")


def decoder_layers(base: PreTrainedModel) -> Sequence[nn.Module]:
    """The decoder layers, in order.

    Raises:
        KVPruneError: the model has no such list.
    """
    for name in DECODER_LAYERS:
        layers = getattr(base, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers):
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
            if not _takes_keywords(_class(module)):
                raise unsupported(base, f"{type(module).__name__} takes no further keywords")
            return module
    raise unsupported(base, f"{type(layer).__name__} has no self-attention with a layer_idx")


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


def check_family(model: PreTrainedModel) -> None:
    """Refuses a model whose layers kvprune cannot follow, by name and with the reason.

    Raises:
        KVPruneError: see above.
    """
    if not isinstance(model, PreTrainedModel):
        raise KVPruneError(
            f"attach: expected a transformers PreTrainedModel, came {type(model).__name__}"
        )
    config: Any = model.config
    base: Any = model.base_model
    if config.is_encoder_decoder:
        raise unsupported(model, "encoder-decoder models have a second cache, of the encoder")
    if config.model_type in REFUSED:
        raise unsupported(model, REFUSED[config.model_type])
    if not base._can_set_attn_implementation():
        raise unsupported(model, "its attention does not go through AttentionInterface")
    if getattr(config, "reorder_and_upcast_attn", False):
        raise unsupported(model, "reorder_and_upcast_attn goes by the name of its attention")
    _check_layer_types(model)
    _check_devices(model)
    if isinstance(model, GenerationMixin) and not hasattr(model, "_prepare_cache_for_generation"):
        raise unsupported(model, "this transformers release prepares caches in another place")
    if backend_of(config) not in BACKENDS:
        raise unsupported(
            model,
            f"its attention implementation is {backend_of(config)!r}; load it with "
            f"attn_implementation='sdpa' or 'eager'",
        )


def _check_devices(model: PreTrainedModel) -> None:
    devices = {str(d) for d in getattr(model, "hf_device_map", {}).values()}
    if len(devices) > 1:
        raise KVPruneError(
            f"attach: expected a model on one device, came one on {', '.join(sorted(devices))}. "
            f"Load it without device_map, or with device_map={{'': 0}}"
        )


def _check_layer_types(model: PreTrainedModel) -> None:
    try:
        types, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    except Exception as error:
        raise unsupported(model, f"its layer types cannot be read ({error})") from error
    strange = sorted(set(types) - LAYER_TYPES)
    if strange:
        raise unsupported(model, f"it has layers of type {', '.join(strange)}")


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
def _parameters(module: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)[1:]


@cache
def _takes_keywords(module: Any) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An argument of `module`'s forward by name, however it was passed; None if it was not."""
    if name in kwargs:
        return kwargs[name]
    names = _parameters(_class(module))
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else None


def with_argument(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` and `kwargs` with one argument replaced where it was passed."""
    names = _parameters(_class(module))
    place = names.index(name) if name in names else len(args)
    if name not in kwargs and place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}
