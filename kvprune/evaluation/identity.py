"""What tells models, learned modules and policies from others, so that results are not mixed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.devices import named_weights
from kvprune.families import unwrapped
from kvprune.policy import TokenPolicy
from kvprune.saving import describe


def model_digest(model: Any) -> str:
    """Of a model's config and adapters, of all its weights, and of the tokens at which it ends."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    said = (weights_digest(unwrapped(model)), _adapters(model), ends)
    return hashlib.sha256(repr(said).encode()).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """Of every byte of parameters and of buffers that are saved with them.

    Of packed ones only what `saving.describe` says of them.
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
    """Which of PEFT's adapters are in use, layer by layer, and how strongly."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    layers = (part for part in model.modules() if hasattr(part, "merged_adapters"))
    return [[getattr(layer, name, None) for name in names] for layer in layers]


def _bytes(weight: Tensor) -> Any:
    return weight.detach().cpu().flatten().view(torch.uint8).numpy()


def code_digest(policies: Iterable[TokenPolicy]) -> str:
    """Of the files that policies from outside kvprune stand in; "" where there are none.

    Of classes that were typed in, as in a notebook, of their own code.
    """
    kinds = dict.fromkeys(kind for policy in policies for kind in type(policy).__mro__)
    sources = dict.fromkeys(_source(kind) for kind in kinds if _is_outside(kind))
    return " ".join(hashlib.sha256(source).hexdigest()[:16] for source in sources)


def _is_outside(kind: type) -> bool:
    return issubclass(kind, TokenPolicy) and kind.__module__.partition(".")[0] != "kvprune"


def _source(kind: type) -> bytes:
    """The file of a class; what its functions and numbers are where it was typed in."""
    with suppress(TypeError, OSError):
        found = inspect.getsourcefile(kind)
        if found is not None and Path(found).is_file():
            return Path(found).read_bytes()
    own = {n: v for n, v in vars(kind).items() if callable(v) or not n.startswith("__")}
    return repr(sorted((name, _said(value)) for name, value in own.items())).encode()


def _said(value: Any) -> str:
    """Of a class's attribute, what does not change from one run to the next."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    code = getattr(value, "__code__", value)
    if isinstance(code, CodeType):
        return repr((code.co_code, code.co_names, [_said(const) for const in code.co_consts]))
    if isinstance(value, frozenset):
        return repr(sorted(map(repr, value)))
    return repr(value) if isinstance(value, (int, float, str, tuple, type(None))) else ""
