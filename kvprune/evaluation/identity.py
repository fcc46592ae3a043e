"""What tells models, learned modules and policies from others, so that results are not mixed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.devices import named_weights
from kvprune.families import unwrapped
from kvprune.policy import TokenPolicy
from kvprune.saving import describe


def model_digest(model: Any) -> str:
    """Of a model's config, of all its weights, and of the tokens at which it ends."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return hashlib.sha256(f"{weights_digest(unwrapped(model))} {ends}".encode()).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """Of every byte of the parameters; of packed ones only what `saving.describe` says of them."""
    said = hashlib.sha256(describe(module)["digest"].encode())
    for _, weight in named_weights(module):
        if type(weight) is nn.Parameter and not weight.is_meta:
            said.update(_bytes(weight))
    return said.hexdigest()


def _bytes(weight: Tensor) -> Any:
    return weight.detach().cpu().flatten().view(torch.uint8).numpy()


def code_digest(policies: Iterable[TokenPolicy]) -> str:
    """Of the files that policies from outside kvprune stand in; "" where there are none."""
    kinds = dict.fromkeys(kind for policy in policies for kind in type(policy).__mro__)
    files = dict.fromkeys(file for kind in kinds if _is_outside(kind) for file in _source(kind))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return " ".join(digest[:16] for digest in digests)


def _is_outside(kind: type) -> bool:
    return issubclass(kind, TokenPolicy) and kind.__module__.partition(".")[0] != "kvprune"


def _source(kind: type) -> list[Path]:
    """The file of a class, in a list; an empty one for what was typed in."""
    try:
        found = inspect.getsourcefile(kind)
    except (TypeError, OSError):
        return []
    return [Path(found)] if found is not None and Path(found).is_file() else []
