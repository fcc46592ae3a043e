"""Fingerprints of a model's config and weights: which model is this?

`describe` samples the weights, in milliseconds, for files of caches. `model_digest` reads all of
them, for results of comparisons.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .devices import named_weights
from .structure import unwrapped

SAMPLES = 16
"""Weights of each parameter that `describe` reads."""


def described(model: nn.Module, memory: dict[str, Any]) -> dict[str, str]:
    """`describe`, anew only after some weight or the config has changed.

    Args:
        model: which.
        memory: of the model, where the last answer is kept.
    """
    state = (_config(model), [(p.data_ptr(), _version(p)) for p in model.parameters()])
    if memory.get("description", (None, None))[0] != state:
        memory["description"] = (state, describe(model))
    found: dict[str, str] = memory["description"][1]
    return found


def _version(weight: Tensor) -> int:
    """The number of times a weight was written to; inference mode does not count."""
    return 0 if weight.is_inference() else weight._version


def describe(model: nn.Module) -> dict[str, str]:
    """A description that tells a model from others, as far as keys and values go.

    Returns:
        `name`, for people, and `digest`, of its config and of some weights of every parameter,
        exactly as they are; fine-tuning, another precision or an adapter change it.
    """
    said = hashlib.sha256(_config(model).encode())
    named = list(named_weights(model))
    for name, weight in named:
        said.update(repr((name, str(weight.dtype), tuple(weight.shape))).encode())
    samples = [_sampled(weight) for _, weight in named if _is_plain(weight)]
    if samples:
        together = torch.cat([s.to(samples[0].device) for s in samples])
        said.update(together.cpu().numpy().tobytes())
    path = getattr(getattr(model, "config", None), "name_or_path", "")
    return {"name": f"{type(model).__name__} {path}".rstrip(), "digest": said.hexdigest()}


def _is_plain(weight: Tensor) -> bool:
    """Whether its numbers can be read: quantised ones are packed."""
    return type(weight) is nn.Parameter and weight.device.type != "meta"


def _config(model: nn.Module) -> str:
    """The config fields that a family adds, without those that generation alone reads."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return ""
    common = {"use_cache", *PreTrainedConfig().to_dict()}
    own = config.get_text_config(decoder=True).to_dict().items()
    kept = {k: v for k, v in own if k not in common and not k.endswith("_token_id")}
    return json.dumps(kept, sort_keys=True, default=str)


def _sampled(weight: Tensor) -> Tensor:
    """Up to `SAMPLES` of a parameter's weights, evenly spread, float64."""
    flat = weight.detach().flatten()
    return flat[:: max(flat.numel() // SAMPLES, 1)][:SAMPLES].double()


def model_digest(model: Any) -> str:
    """The digest of a model's config, adapters and weights, and of the tokens at which it ends."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    said = (weights_digest(unwrapped(model)), _adapters(model), ends)
    return hashlib.sha256(repr(said).encode()).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """The digest of every byte of parameters, and of buffers that are saved with them.

    Of packed ones only what `describe` says of them.
    """
    said = hashlib.sha256(describe(module)["digest"].encode())
    weights = [weight for _, weight in named_weights(module)]
    for weight in (*weights, *_buffers(module)):
        if type(weight) in (nn.Parameter, Tensor, nn.Buffer) and not weight.is_meta:
            said.update(_bytes(weight))
    return said.hexdigest()


def _buffers(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        kept = sorted(part._buffers.keys() - part._non_persistent_buffers_set)
        yield from (buffer for name in kept if (buffer := part._buffers[name]) is not None)


def _adapters(model: nn.Module) -> list[Any]:
    """PEFT's adapters that are in use, layer by layer, and their strength."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    layers = (part for part in model.modules() if hasattr(part, "merged_adapters"))
    return [[getattr(layer, name, None) for name in names] for layer in layers]


def _bytes(weight: Tensor) -> Any:
    return weight.detach().cpu().flatten().view(torch.uint8).numpy()
