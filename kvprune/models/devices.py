"""Models that accelerate spreads over several devices (`device_map`), or offloads.

Each decoder layer then computes on a device of its own. accelerate moves what a layer is handed
inside the layer's forward, so after the hooks of `attach`; what kvprune itself holds of a forward
follows, to each device once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

AWAY = torch.device("meta")
"""The device on which a weight that is offloaded seems to be."""


class Copies:
    """Tensors on the devices that ask for them; each is moved there once."""

    def __init__(self) -> None:
        self._moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def on(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The very tensor if it is there, else its copy, one object for all who ask."""
        if tensor.device == device:
            return tensor
        key = (id(tensor), device)
        # A copy of this object has the ids of the tensors that it was copied from.
        if key not in self._moved or self._moved[key][0] is not tensor:
            self._moved[key] = (tensor, tensor.to(device))
        return self._moved[key][1]


def device_of(module: nn.Module) -> torch.device:
    """The device of a module; accelerate's hooks know it of offloaded weights."""
    weight = next(module.parameters(), None)
    if weight is not None and weight.device != AWAY:
        return weight.device
    return next(_execution_devices(module), AWAY if weight is not None else torch.device("cpu"))


def devices_of(module: nn.Module) -> set[torch.device]:
    """All that a module computes on."""
    found = {weight.device for weight in module.parameters()}
    if AWAY not in found:
        return found
    return found - {AWAY} | set(_execution_devices(module)) or {AWAY}


def named_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`named_parameters`, with those that are offloaded fetched from where they are."""
    for name, weight in module.named_parameters():
        yield name, _fetched(module, name, weight) if weight.device == AWAY else weight


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings some weights only while they are needed."""
    return any(getattr(hook, "offload", False) for m in module.modules() for hook in _hooks(m))


def _fetched(module: nn.Module, name: str, weight: nn.Parameter) -> nn.Parameter:
    owner, _, own = name.rpartition(".")
    for hook in _hooks(module.get_submodule(owner)):
        if getattr(hook, "weights_map", None) is not None:
            return nn.Parameter(hook.weights_map[own], requires_grad=False)
    return weight


def _execution_devices(module: nn.Module) -> Iterator[torch.device]:
    for hook in (hook for m in module.modules() for hook in _hooks(m)):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            # A number or a name without one, as tensors never say it.
            yield torch.empty(0, device=device).device


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of one module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def in_memory(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are in memory here, so that to read them waits for nothing.

    Not where a compiler looks on, nor where it has no numbers.
    """
    plain = type(tensor) is Tensor and tensor.device.type == "cpu"
    return plain and not torch.compiler.is_compiling()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of torch's autocast on a device now; None where it is off."""
    kind = device.type
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return None
    if not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operations on a device compute in the dtypes of what they are given."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
