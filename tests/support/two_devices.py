"""Devices that a machine without any can have: real numbers on the CPU, said to be elsewhere.

A tensor on such a device holds an ordinary one. Every operation runs on what is held, and one
that mixes devices raises, as with CUDA. So a model that is spread over several gives the very
numbers of the CPU, or fails where something was left behind on another device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# A type that torch knows, that needs no initialisation, and that nobody asks for.
ZERO, ONE = (torch.device("lazy", index) for index in range(2))
CPU = torch.device("cpu")

_COPY, _INTO = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default


class MixedDevices(RuntimeError):
    """An operation on tensors of several devices."""


class Placed(Tensor):
    """A tensor that says it is on a device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Placed:
        """`held`, as if it were there."""
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.held!r}, {self.device})"

    def untyped_storage(self) -> torch.UntypedStorage:
        """Of what is held, so that bytes can be counted."""
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        """Which torch has for no subclass."""
        return self.held.tolist()

    def data_ptr(self) -> int:
        """Of what is held."""
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class Devices(TorchDispatchMode):
    """While open, `ZERO` and `ONE` are devices like others.

    moved: the shapes of what went from one of them to the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[int, ...]] = []
        self._made = _Made()

    def __enter__(self) -> Devices:
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _COPY and {args[0].device, kwargs.get("device")} == {ZERO, ONE}:
            self.moved.append(tuple(args[0].shape))
        return _run(func, args, kwargs)


class _Made(TorchFunctionMode):
    """What torch makes of numbers, past every dispatch mode, is made on the CPU and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None:
            return func(*args, **{**kwargs, "device": None}).to(device)
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            index = (_there(i, args[0].device) if isinstance(i, list) else i for i in args[1])
            args = (args[0], tuple(index))
        return func(*args, **kwargs)


def _there(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers).to(device)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    device = _device(func, given, kwargs.get("device"))
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": CPU}
    if func is _COPY and given[0].device != device:
        # What is held is on the CPU in any case: a copy must still be one.
        args, kwargs = (given[0].clone(),), {**kwargs, "device": CPU}
    # In place, or into `out`: the very object that was handed in comes back.
    known = {id(t.held): t for t in given if isinstance(t, Placed)}
    args, kwargs = pytree.tree_map_only(Placed, lambda t: t.held, (args, kwargs))
    found = func(*args, **kwargs)
    return pytree.tree_map_only(Tensor, lambda t: known.get(id(t), _placed(t, device)), found)


def _placed(held: Tensor, device: torch.device) -> Tensor:
    return held if device == CPU else Placed(held, device)


def _device(func: Any, given: list[Tensor], asked: torch.device | None) -> torch.device:
    """Where an operation runs; refuses one that mixes."""
    if asked is not None:
        return torch.device(asked)
    if func is _INTO:
        return given[0].device
    # A number as a tensor goes with anything.
    found = {t.device for t in given if t.dim() or t.device != CPU}
    if len(found) > 1:
        raise MixedDevices(f"{func} on {sorted(map(str, found))}")
    return found.pop() if found else CPU


def place(module: nn.Module, device: torch.device) -> None:
    """Moves all weights and buffers of a module there."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(_placed(weight.detach(), device), False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _placed(buffer, device)
