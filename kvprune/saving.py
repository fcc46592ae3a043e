"""A cache as a file: one safetensors file, whose header says in JSON what it is.

Metadata: `kvprune_cache`, the version of this format; `numbers`, JSON (the model, the policies'
reprs, how many columns were seen, each layer's slots); `digest`, SHA-256 over the version, the
numbers and every tensor. Tensors: `rows.first`, `rows.prompt_length`, `rows.prompt_ids` (not in
files of earlier releases: then a prompt is not known again), `padding` and, by layer, keys, values,
columns, statistics, the hole and, where positions are assigned inside the cache, those that keys
came with and `positions.*`. Only slots in use are written; layers that share one tensor of columns
share it in the file.

Reading runs no code of the file. The digest finds damage; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .devices import Copies, device_of, named_weights
from .errors import KVPruneError
from .families import decoder_layers
from .files import write_whole
from .policy import Lengths
from .rows import PromptIds, RowNumbers, holes_in

if TYPE_CHECKING:
    from .cache import ComposedCache

VERSION = "2"
SAMPLES = 16


@dataclass(frozen=True)
class Contents:
    """What a file holds: numbers, as JSON has them, and tensors by name."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor]


def contents_of(cache: ComposedCache) -> Contents:
    """What a file has to hold for `restore` to bring a cache back."""
    assert cache._rows is not None
    tensors = {"rows.first": cache._rows.first, "rows.prompt_length": cache._rows.prompt.tensor}
    if cache._padding is not None:
        tensors["padding"] = cache._padding
    if cache._read is not None:
        tensors["rows.prompt_ids"] = cache._read.by_row()
    if cache._positions is not None:
        tensors |= {f"positions.{n}": t for n, t in cache._positions.named_tensors().items()}
    layers, owners = [], dict[int, int]()
    for index, layer in cache.slot_layers():
        held = layer.named_tensors()
        # The first layer that has this very tensor.
        owner = owners.setdefault(id(layer._columns), index)
        if owner != index:
            del held["columns"]
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in held.items()}
        names = list(layer.names)
        layers.append({**layer.numbers(), "columns_of": owner, "statistics": names})
    policies = [repr(p) for p in cache.policies]
    numbers = {"model": cache._model, "policies": policies, "seen": cache.seen, "layers": layers}
    evicts = any("rank_slots" in p.hooks for p in cache.policies)
    numbers["fixed"] = cache.seen if evicts else cache._fixed
    numbers["positions"] = None if cache._positions is None else cache._positions.way
    return Contents(numbers, tensors)


def check_fits(cache: ComposedCache, path: Path, numbers: dict[str, Any]) -> None:
    """Refuses a file for a cache that is tied to its model and empty.

    Raises:
        KVPruneError: it is of another model, positions were assigned in another way, or a policy
            wants a statistic that was not observed.
    """
    if numbers["model"]["digest"] != cache._model["digest"]:
        raise KVPruneError(
            f"{path}: expected a cache of this model ({cache._model['name']}: its config, its "
            f"precision and its weights), came one of another ({numbers['model']['name']}). "
            f"Load it with the model that it was saved with"
        )
    way = None if cache._positions is None else cache._positions.way
    if numbers["positions"] != way:
        raise KVPruneError(
            f"{path}: saved with [{', '.join(numbers['policies'])}]: expected policies that "
            f"assign positions in the same way, came {list(cache.policies)!r}"
        )
    for (index, layer), saved in zip(cache.slot_layers(), numbers["layers"], strict=True):
        if not set(layer.names) <= set(saved["statistics"]):
            raise KVPruneError(
                f"{path}: saved with [{', '.join(numbers['policies'])}], which observed "
                f"{saved['statistics']} at layer {index}; {list(cache.policies)!r} needs "
                f"{list(layer.names)}. Load it with policies that need no more than was "
                f"observed, or read the prompt again with these"
            )


def restore(cache: ComposedCache, contents: Contents, base: Any) -> None:
    """Makes an empty cache the one that was saved; a layer's part goes to where the layer is."""
    numbers, tensors, copies = contents.numbers, contents.tensors, Copies()
    devices = [device_of(layer) for layer in decoder_layers(base)]
    for (index, layer), saved in zip(cache.slot_layers(), numbers["layers"], strict=True):
        start = f"layers.{index}."
        mine = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        mine["columns"] = tensors[f"layers.{saved['columns_of']}.columns"]
        layer.restore(saved, {n: copies.on(t, devices[index]) for n, t in mine.items()})
    at = device_of(base)
    if cache._positions is not None:
        cache._positions.restore(tensors, "positions.", devices)
    home = {n: tensors[n].to(at) for n in ("rows.first", "rows.prompt_length")}
    cache.seen, cache._fixed = numbers["seen"], numbers["fixed"]
    for _, layer in cache.slot_layers():
        layer.seen = cache.seen
    cache._padding = tensors["padding"].to(at) if "padding" in tensors else None
    ids = tensors.get("rows.prompt_ids")
    cache._read = None if ids is None else PromptIds(ids)
    first, prompt = home["rows.first"], Lengths(home["rows.prompt_length"])
    cache._rows = RowNumbers(first, prompt, holes_in(cache._padding, first))


def write(path: Path, contents: Contents) -> None:
    """Writes a file, whole or not at all.

    Raises:
        KVPruneError: it cannot be written; what was at `path` before is still there.
    """
    # Copies, since even a contiguous tensor of one element may have strides that bytes cannot.
    whole = torch.contiguous_format
    tensors = {n: t.detach().cpu().clone(memory_format=whole) for n, t in contents.tensors.items()}
    numbers = json.dumps(contents.numbers, sort_keys=True)
    metadata = {"kvprune_cache": VERSION, "numbers": numbers, "digest": _digest(numbers, tensors)}
    write_whole(path, lambda scratch: save_file(tensors, scratch, metadata))


def read(path: Path) -> Contents:
    """Reads a file, onto the CPU.

    Raises:
        KVPruneError: there is none, it is no cache, of another version, or damaged.
    """
    if not path.is_file():
        raise KVPruneError(f"{path}: expected a file that ComposedCache.save wrote, found none")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: what the file lends goes when the file is written anew.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise _damaged(path, str(error)) from error
    _check_version(path, metadata)
    numbers = metadata.get("numbers", "")
    if metadata.get("digest") != _digest(numbers, tensors):
        raise _damaged(path, "its contents do not have the digest that was written with them")
    return Contents(json.loads(numbers), tensors)


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    found = metadata.get("kvprune_cache")
    if found is None:
        raise KVPruneError(f"{path}: expected a file that ComposedCache.save wrote, came another")
    if found != VERSION:
        raise KVPruneError(
            f"{path}: expected version {VERSION} of the cache format, came {found!r}. Read the "
            f"prompt again and save it with this release of kvprune"
        )


def _damaged(path: Path, reason: str) -> KVPruneError:
    return KVPruneError(
        f"{path}: expected a whole file that ComposedCache.save wrote; this one is damaged or cut "
        f"short ({reason}). Read the prompt again and save it anew"
    )


def _digest(numbers: str, tensors: Mapping[str, Tensor]) -> str:
    said = hashlib.sha256(f"{VERSION} {numbers}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        said.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        data: Any = tensor.flatten().view(torch.uint8).numpy()
        said.update(data)
    return said.hexdigest()


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
    """How often a weight was written to; inference mode does not count."""
    return 0 if weight.is_inference() else weight._version


def describe(model: nn.Module) -> dict[str, str]:
    """What tells a model from others, as far as its keys and values go.

    Returns:
        name: for people. digest: of its config and of some weights of every parameter, exactly
            as they are; fine-tuning, another precision or an adapter change it.
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
    """What a family adds to every config's fields, but for what generation alone reads."""
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
