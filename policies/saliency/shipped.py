"""Heads that ship with kvprune for Saliency, found by a model's architecture and weights."""

from __future__ import annotations

from functools import cache
from os import PathLike
from pathlib import Path

from torch import nn

from kvprune.models.devices import device_of

from ..sdtp.shipped import FOLDER, fingerprint, same_model
from .heads import WEIGHTS, SaliencyHeads


def heads_for(model: nn.Module) -> SaliencyHeads | None:
    """The heads that ship for a model, on its device; None where none do."""
    folders = sorted(path.parent for path in FOLDER.glob(f"*/{WEIGHTS}"))
    if not folders:
        return None
    mine = fingerprint(model)
    for folder in folders:
        if same_model(_loaded(folder, "cpu").configuration["fingerprint"], mine):
            return _loaded(folder, str(device_of(model)))
    return None


def heads_in(folder: str | PathLike[str], model: nn.Module) -> SaliencyHeads:
    """The heads in a folder, on the model's device; read again after their file changed.

    Raises:
        KVPruneError: the folder has no such heads.
    """
    file = Path(folder, WEIGHTS)
    written = file.stat().st_mtime_ns if file.is_file() else 0
    return _loaded(Path(folder), str(device_of(model)), written)


@cache
def _loaded(folder: str | Path, device: str, written: int = 0) -> SaliencyHeads:
    return SaliencyHeads.load(folder).to(device)
