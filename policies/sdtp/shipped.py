"""Heads that ship with kvprune, found by a model's architecture and weights, not by its name."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from torch import Tensor

from kvprune.errors import KVPruneError
from kvprune.models.devices import device_of, named_weights

from .heads import SDTPHeads

FOLDER = Path(__file__).parent / "pretrained"

ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SAMPLES = 8
ALIKE = 0.98


def fingerprint(model: Any) -> dict[str, Any]:
    """The fingerprint that tells a model from all others, in whatever precision it was loaded.

    Returns:
        A dict with three keys. `architecture`: fields of the model's config, by name. `vectors`: a
        few weights of the first, middle and last parameter of one dimension, by the parameter's
        name, rounded to bfloat16. `matrices`: the same of parameters of two dimensions.
    """
    config = model.config.get_text_config(decoder=True)
    named = [(n, p) for n, p in named_weights(model.base_model) if p.numel() > SAMPLES]
    return {
        "architecture": {name: getattr(config, name, None) for name in ARCHITECTURE},
        "vectors": _some([(n, p) for n, p in named if p.dim() == 1]),
        "matrices": _some([(n, p) for n, p in named if p.dim() == 2]),
    }


def weights_digest(module: torch.nn.Module) -> str:
    """The digest that tells a module's parameters and buffers from all others, bit for bit.

    A fingerprint looks at a few weights; this digest reads all of the module's `state_dict`.
    """
    said = hashlib.sha256()
    for name, weight in module.state_dict().items():
        said.update(repr((name, str(weight.dtype), tuple(weight.shape))).encode())
        said.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return said.hexdigest()


def same_model(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two fingerprints are of one checkpoint.

    Vectors (norms, biases) must agree within a bfloat16 unit: float16 and bfloat16 round
    differently, and no format quantises vectors. Matrices must correlate: 4-bit quantisation
    moves their weights by some percent.
    """
    if one["architecture"] != two["architecture"]:
        return False
    if any(list(one[kind]) != list(two[kind]) for kind in ("vectors", "matrices")):
        return False
    matrices = torch.stack([_flat(f["matrices"]) for f in (one, two)])
    close = torch.allclose(_flat(one["vectors"]), _flat(two["vectors"]), rtol=2**-7, atol=1e-4)
    return close and float(torch.corrcoef(matrices)[0, 1]) > ALIKE


def heads_for(model: torch.nn.Module) -> SDTPHeads:
    """The heads that ship for a model, in float32 on its device; the same object every time.

    Raises:
        KVPruneError: no heads ship for this model.
    """
    mine = fingerprint(model)
    folders = sorted(path.parent for path in FOLDER.glob("*/model.safetensors"))
    for folder in folders:
        if same_model(_loaded(folder, "cpu").configuration["fingerprint"], mine):
            return _loaded(folder, str(device_of(model)))
    name = getattr(getattr(model, "config", None), "name_or_path", "") or "NAME_OR_PATH"
    raise KVPruneError(
        f"SDTP(): no heads ship with kvprune for this model ({type(model).__name__}, {name}); "
        f"expected one of {[folder.name for folder in folders]}. Train heads for it with "
        f"`kvprune train-sdtp --model {name} --data TEXT --out FOLDER` and pass them as "
        f"SDTP(SDTPHeads.from_pretrained(FOLDER))"
    )


def heads_in(folder: str, model: torch.nn.Module) -> SDTPHeads:
    """The heads in a folder, in float32 on the model's device; read again after their file changed.

    Raises:
        KVPruneError: the folder has no heads.
    """
    file = Path(folder, SAFETENSORS_SINGLE_FILE)
    written = file.stat().st_mtime_ns if file.is_file() else 0
    return _loaded(folder, str(device_of(model)), written)


@cache
def _loaded(folder: Path | str, device: str, written: int = 0) -> SDTPHeads:
    heads: SDTPHeads = SDTPHeads.from_pretrained(folder)
    return heads.float().to(device).requires_grad_(False)


def _some(parameters: list[tuple[str, Tensor]]) -> dict[str, list[float]]:
    """Sampled weights of the first, middle and last of some parameters, by name."""
    if not parameters:
        return {}
    chosen = dict([parameters[0], parameters[len(parameters) // 2], parameters[-1]])
    return {name: _sampled(weight) for name, weight in chosen.items()}


def _sampled(weight: Tensor) -> list[float]:
    """`SAMPLES` weights of a parameter, evenly spread."""
    step = weight.numel() // SAMPLES
    places = torch.arange(SAMPLES, device=weight.device) * step + step // 2
    values: list[float] = weight.detach().flatten()[places].to(torch.bfloat16).tolist()
    return values


def _flat(weights: dict[str, list[float]]) -> Tensor:
    return torch.tensor([w for values in weights.values() for w in values])
