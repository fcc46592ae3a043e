"""The parts of a model: its decoder layers, and the arguments that these are handed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import KVPruneError
from .releases import parameters_of

DECODER_LAYERS = ("layers", "h")


LANGUAGE_MODELS = ("language_model", "text_model")
"""The names of the language model within one that sees pictures, too."""

INNER_MODELS = ("model", "decoder", *LANGUAGE_MODELS)
"""The names of the model with the decoder layers, where it is below the base model."""


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model that has the decoder layers and is handed the cache; no head."""
    base: Any = model.base_model
    inner = [getattr(base, name, None) for name in INNER_MODELS]
    candidates = [base, *(m for m in inner if isinstance(m, PreTrainedModel))]
    found: PreTrainedModel = next((m for m in candidates if _layer_list(m) is not None), base)
    return found


def sees_pictures(model: PreTrainedModel) -> bool:
    """Whether the model with the decoder layers is the language model within another one."""
    around: Any = model.base_model
    return any(getattr(around, name, None) is base_of(model) for name in LANGUAGE_MODELS)


def has_several_positions(base: PreTrainedModel) -> bool:
    """Whether tokens of pictures have several positions each (mrope)."""
    return "mrope_section" in (getattr(base.config, "rope_parameters", None) or {})


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


def takes(module: nn.Module, name: str) -> bool:
    """Whether `module`'s forward has an argument of that name."""
    return name in parameters_of(type(module))


def check_kind(model: Any) -> None:
    """Refuses what is no model of transformers.

    Raises:
        KVPruneError: see above.
    """
    if not isinstance(model, PreTrainedModel):
        raise KVPruneError(
            f"attach: expected a transformers PreTrainedModel, got {type(model).__name__}"
        )


def query_heads(base: Any) -> int:
    """The number of query heads of the model's attention."""
    config = base.config.get_text_config(decoder=True)
    # In the config of an encoder-decoder model the usual name is that of the encoder's.
    return int(getattr(config, "decoder_attention_heads", config.num_attention_heads))


OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
"""The names of the projection of attention's outputs."""


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention of a decoder layer, by its number and its projection; None if there is none."""
    found = (module for module in layer.modules() if hasattr(module, "layer_idx"))
    return next((m for m in found if any(hasattr(m, name) for name in OUTPUTS)), None)


@torch.no_grad()
def output_weight(attention: nn.Module) -> Tensor:
    """What each query head's output is multiplied with, `[Hq * Dv, C]`.

    Raises:
        KVPruneError: the attention has no projection that is known.
    """
    named = (getattr(attention, name, None) for name in OUTPUTS)
    projection = next((module for module in named if isinstance(module, nn.Module)), None)
    if projection is None:
        raise KVPruneError(
            f"output_weight: {type(attention).__name__} has no projection named "
            f"{', '.join(OUTPUTS)}: expected another model, or a policy that does not ask for it"
        )
    weight = getattr(projection, "weight", None)
    if isinstance(projection, nn.Linear) and weight is not None and weight.is_floating_point():
        return weight.detach().T
    # Adapters, quantised weights, and layers of other forms: what they make of each unit vector.
    size = getattr(projection, "in_features", None) or getattr(projection, "nx", None)
    if size is None:
        raise KVPruneError(
            f"output_weight: {type(projection).__name__} does not say how many inputs it has: "
            f"expected a linear layer, or a policy that does not ask for it"
        )
    # Weights that torch quantised dynamically are no parameters, and take float32.
    floats = (p for p in projection.parameters() if p.is_floating_point())
    like = next(floats, torch.empty(0))
    unit = torch.eye(size, device=like.device, dtype=like.dtype)
    found: Tensor = projection(unit) - projection(torch.zeros_like(unit[:1]))
    return found


def unsupported(model: nn.Module, reason: str) -> KVPruneError:
    """The error that refuses a family by name."""
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    return KVPruneError(
        f"{type(model).__name__} (model type {family!r}) is not supported: {reason}. Expected a "
        f"decoder-only model with plain or sliding-window attention in every layer"
    )


def argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An argument of `module`'s forward by name, however it was passed; None if it was not."""
    if name in kwargs:
        return kwargs[name]
    names = parameters_of(type(module))
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else None


def arguments_given(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments that `module`'s forward was handed, by name."""
    return {**dict(zip(parameters_of(type(module)), args, strict=False)), **kwargs}


def with_argument(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` and `kwargs` with one argument replaced where it was passed."""
    names = parameters_of(type(module))
    place = names.index(name) if name in names else len(args)
    if name not in kwargs and place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}


@dataclass(frozen=True)
class Local:
    """The mask of a layer that sees only what is near.

    size: how many columns: the newest ones, or, `chunked`, those of the query's own chunk,
        counted from the row's first column.
    """

    size: int
    chunked: bool = False

    def oldest(self, query: int, first: Tensor) -> Tensor:
        """The oldest column `[B]` that a query at column `query`, or after it, can see.

        Args:
            query: a column.
            first: `[B]`, each row's first valid column.
        """
        if self.chunked:
            return query - (query - first) % self.size
        return torch.full_like(first, query - self.size + 1)
