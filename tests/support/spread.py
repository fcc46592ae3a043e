"""Tiny models that accelerate has spread over the two devices of `two_devices`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import dispatch_model
from torch import nn

import kvprune
from kvprune.models.structure import base_of, decoder_layers

from .two_devices import ONE, ZERO, place

HALVES = (ZERO, ZERO, ONE, ONE)


def spread(model: Any, layers: Sequence[torch.device] = HALVES) -> Any:
    """A model of four layers, attached, on the devices of `layers`; to be used where they exist.

    What comes before the layers is on `ZERO`, what comes behind them on `ONE`, as
    `device_map="auto"` has it.
    """
    names = {id(module): name for name, module in model.named_modules()}
    where = {names[id(module)]: device for module, device in _blocks(model, layers)}
    for name, device in where.items():
        place(model.get_submodule(name), device)
    # Only what is missing in a map of blocks is a warning of accelerate's.
    model = dispatch_model(
        model, where, main_device=ZERO, skip_keys=model._skip_keys_device_placement
    )
    return kvprune.attach(model)


def _blocks(model: Any, layers: Sequence[torch.device]) -> Iterator[tuple[nn.Module, torch.device]]:
    base = base_of(model)
    blocks = decoder_layers(base)
    yield from zip(blocks, layers, strict=True)
    for name, child in base.named_children():
        if not any(child is layer or blocks[0] in child.modules() for layer in blocks):
            behind = "Norm" in type(child).__name__ and child is not next(base.children())
            # Gemma 4 makes an input for each layer before the first of them, with a norm.
            behind = behind and not name.startswith("per_layer")
            yield child, ONE if behind else ZERO
    head = model.get_output_embeddings()
    if head is not None:
        yield head, ONE
