"""A cache as a file: one safetensors file, whose header says in JSON what it is.

Metadata: `kvprune_cache`, the version of this format; `numbers`, JSON (the model, the policies'
reprs, the store's, how many columns were seen, each layer's slots); `digest`, SHA-256 over the
version, the numbers and every tensor. Tensors: `rows.first`, `rows.prompt_length`,
`rows.prompt_ids` (not in files of earlier releases: then a prompt is not known again), `padding`
and, by layer, keys and values (`codes` and `grids` with a store that quantises), columns,
statistics, the free slot (`hole`) and, where positions are assigned inside the cache, those that
keys came with and `positions.*`. A layer of several rectangles has the tensors of each, behind its
number. Only slots in use are written; layers that share one tensor of columns share it in the file.

Reading runs no code of the file. The digest finds damage; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import KVPruneError
from ..files import write_whole
from ..models.devices import Copies, device_of
from ..models.structure import decoder_layers
from ..policy.base import TokenPolicy
from ..policy.budget import Lengths
from ..policy.composition import evicts
from ..statistics import Attention
from ..storage.quantized import Quantized
from ..storage.rows import PromptIds, RowNumbers, inner_padding_of
from .state import CacheState

VERSION = "2"

SEVERAL = "3"
"""The version of files in which some layer's rows or heads stand apart; see `Rectangles`."""


@dataclass(frozen=True)
class Contents:
    """The contents of a file: numbers, as JSON has them, and tensors by name."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor]


def contents_of(
    state: CacheState,
    model: dict[str, str],
    policies: Sequence[TokenPolicy],
    store: Quantized | None,
) -> Contents:
    """The contents of the file of a cache, from which `restore` brings it back.

    Args:
        state: what the cache holds.
        model: see `models.fingerprint.described`.
        policies: of the cache.
        store: likewise.

    Raises:
        KVPruneError: two statistics look alike.
    """
    assert state.rows is not None
    tensors = {"rows.first": state.rows.first, "rows.prompt_length": state.rows.prompt.tensor}
    if state.padding is not None:
        tensors["padding"] = state.padding
    if state.read is not None:
        tensors["rows.prompt_ids"] = state.read.by_row()
    if state.positions is not None:
        tensors |= {f"positions.{n}": t for n, t in state.positions.named_tensors().items()}
    layers, owners = [], dict[int, int]()
    for index, layer in state.slot_layers():
        held, owner = layer.named_tensors(), index
        if layer.lanes is None:
            # The first layer that has this very tensor.
            owner = owners.setdefault(id(layer.held_columns), index)
        if owner != index:
            del held["columns"]
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in held.items()}
        observed = [repr(part) for part in layer.parts]
        if len(set(observed)) < len(observed):
            raise KVPruneError(
                f"save: expected statistics that a file can tell apart, got {observed}: give each "
                f"a __repr__ of its own (modules of a Gate: weights, or an extra_repr)"
            )
        layers.append({**layer.numbers(), "columns_of": owner, "statistics": observed})
    numbers = {
        "model": model,
        "policies": [repr(p) for p in policies],
        "seen": state.seen,
        "prompt_end": state.prompt_end,
        "prompts": state.prompts,
        "layers": layers,
        "fixed": state.seen if evicts(policies) else state.fixed,
        "positions": None if state.positions is None else state.positions.way,
        "store": None if store is None else repr(store),
    }
    return Contents(numbers, tensors)


def check_fits(
    state: CacheState,
    model: dict[str, str],
    policies: Sequence[TokenPolicy],
    store: Quantized | None,
    path: Path,
    numbers: dict[str, Any],
) -> None:
    """Refuses a file for a cache that is tied to its model and empty.

    Args:
        state: what the cache holds: empty layers.
        model: see `models.fingerprint.described`.
        policies: of the cache.
        store: likewise.
        path: of the file.
        numbers: of the file.

    Raises:
        KVPruneError: it is of another model or store, positions were assigned in another way, or
            a policy wants a statistic that was not observed.
    """
    if numbers["model"]["digest"] != model["digest"]:
        raise KVPruneError(
            f"{path}: expected a cache of this model ({model['name']}: its config, its "
            f"precision and its weights), got one of another ({numbers['model']['name']}). "
            f"Load it with the model that it was saved with"
        )
    # Earlier releases had no stores.
    held = numbers.get("store")
    if held != (None if store is None else repr(store)):
        raise KVPruneError(
            f"{path}: saved with store={held}: expected the same store, got {store!r}. Load it "
            f"with store={held}, or read the prompt again"
        )
    way = None if state.positions is None else state.positions.way
    if numbers["positions"] != way:
        raise KVPruneError(
            f"{path}: saved with [{', '.join(numbers['policies'])}]: expected policies that "
            f"assign positions in the same way, got {list(policies)!r}"
        )
    for (index, layer), saved in zip(state.slot_layers(), numbers["layers"], strict=True):
        wanted = [repr(part) for part in layer.parts]
        if not set(wanted) <= set(saved["statistics"]):
            raise KVPruneError(
                f"{path}: saved with [{', '.join(numbers['policies'])}], which observed "
                f"{saved['statistics']} at layer {index}; {list(policies)!r} needs "
                f"{wanted}. Load it with policies that need no more than was "
                f"observed, or read the prompt again with these"
            )


def restore(state: CacheState, contents: Contents, base: Any) -> None:
    """Fills empty layers with what was saved; a layer's part goes to where the layer is."""
    numbers, tensors, copies = contents.numbers, contents.tensors, Copies()
    devices = [device_of(layer) for layer in decoder_layers(base)]
    for (index, layer), saved in zip(state.slot_layers(), numbers["layers"], strict=True):
        start = f"layers.{index}."
        mine = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        if saved["columns_of"] != index:
            mine["columns"] = tensors[f"layers.{saved['columns_of']}.columns"]
        layer.restore(saved, {n: copies.on(t, devices[index]) for n, t in mine.items()})
    at = device_of(base)
    if state.positions is not None:
        state.positions.restore(tensors, "positions.", devices)
    home = {n: tensors[n].to(at) for n in ("rows.first", "rows.prompt_length")}
    state.seen, state.fixed = numbers["seen"], numbers["fixed"]
    # Earlier releases did not say where prompts end.
    state.prompt_end = numbers.get("prompt_end", state.seen)
    state.prompts = numbers.get("prompts", 1)
    for _, layer in state.slot_layers():
        layer.seen = state.seen
    state.padding = tensors["padding"].to(at) if "padding" in tensors else None
    ids = tensors.get("rows.prompt_ids")
    state.read = None if ids is None else PromptIds(ids)
    first, prompt = home["rows.first"], Lengths(home["rows.prompt_length"])
    state.rows = RowNumbers(first, prompt, inner_padding_of(state.padding, first))


def write(path: Path, contents: Contents) -> None:
    """Writes a file, whole or not at all.

    Raises:
        KVPruneError: it cannot be written; what was at `path` before is still there.
    """
    # Copies, since even a contiguous tensor of one element may have strides that bytes cannot.
    whole = torch.contiguous_format
    tensors = {n: t.detach().cpu().clone(memory_format=whole) for n, t in contents.tensors.items()}
    numbers = json.dumps(contents.numbers, sort_keys=True)
    several = any("rectangles" in layer for layer in contents.numbers["layers"])
    version = SEVERAL if several else VERSION
    digest = _digest(version, numbers, tensors)
    metadata = {"kvprune_cache": version, "numbers": numbers, "digest": digest}
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
    version = _checked_version(path, metadata)
    numbers = metadata.get("numbers", "")
    if metadata.get("digest") != _digest(version, numbers, tensors):
        raise _damaged(path, "its contents do not have the digest that was written with them")
    return _with_todays_names(json.loads(numbers), tensors)


def _with_todays_names(numbers: dict[str, Any], tensors: dict[str, Tensor]) -> Contents:
    """The contents with the statistic of earlier releases, "attention", under its name of today."""
    today = repr(Attention())
    for layer in numbers["layers"]:
        layer["statistics"] = [today if n == "attention" else n for n in layer["statistics"]]
    old, new = ".statistics.attention", f".statistics.{today}"
    renamed = {
        f"{name.removesuffix(old)}{new}" if name.endswith(old) else name: tensor
        for name, tensor in tensors.items()
    }
    return Contents(numbers, renamed)


def _checked_version(path: Path, metadata: Mapping[str, str]) -> str:
    found = metadata.get("kvprune_cache")
    if found is None:
        raise KVPruneError(f"{path}: expected a file that ComposedCache.save wrote, got another")
    if found not in (VERSION, SEVERAL):
        raise KVPruneError(
            f"{path}: expected version {VERSION} or {SEVERAL} of the cache format, got {found!r}. "
            f"Read the prompt again and save it with this release of kvprune"
        )
    return found


def _damaged(path: Path, reason: str) -> KVPruneError:
    return KVPruneError(
        f"{path}: expected a whole file that ComposedCache.save wrote; this one is damaged or cut "
        f"short ({reason}). Read the prompt again and save it anew"
    )


def _digest(version: str, numbers: str, tensors: Mapping[str, Tensor]) -> str:
    said = hashlib.sha256(f"{version} {numbers}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        said.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        data: Any = tensor.flatten().view(torch.uint8).numpy()
        said.update(data)
    return said.hexdigest()
