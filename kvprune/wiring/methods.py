"""Methods of a model that ours stand in for, and how they are put back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import nn


def replace_method(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Puts one of our functions in the place of a module's method.

    `forward` has no hook instead: `module.forward(...)`, as PEFT and compiled code call it, goes
    past hooks.

    Args:
        module: the model, or its base model.
        name: of the method.
        function: is called with the module, what stood on the module itself in place of the
            method of its class (None for nothing), and the arguments of the call.
    """
    # accelerate puts its own forward there, and a model with a custom_generate its own generate.
    inner = module.__dict__.get(name)
    ours = partial(function, module, inner)
    # generate and pipelines read off the signature what a model takes. Without annotations, which
    # not every pickle can hold.
    signature = inspect.signature(method_of(module, name, inner))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    ours.__dict__["__signature__"] = inspect.Signature(bare)
    # A partial has no name and no docstring of its own.
    replaced = inner or getattr(type(module), name)
    for said in ("__module__", "__name__", "__qualname__", "__doc__"):
        if hasattr(replaced, said):
            ours.__dict__[said] = getattr(replaced, said)
    module.__dict__[name] = ours


def restore_methods(module: nn.Module, functions: Collection[Callable[..., Any]]) -> None:
    """Takes back what `replace_method` did, also where accelerate has wrapped it since.

    Args:
        module: the model, or its base model.
        functions: those that `replace_method` may have put there.
    """
    for name in ("forward", "_old_forward", "generate"):
        ours: Any = module.__dict__.get(name)
        if hasattr(ours, "_torchdynamo_orig_callable"):
            # What the user compiled in place of the method stands around ours.
            ours = inspect.unwrap(ours)
        if getattr(ours, "func", None) not in functions:
            continue
        inner = ours.args[1]
        if name == "_old_forward":
            module.__dict__[name] = method_of(module, "forward", inner)
        elif inner is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = inner


def method_of(module: nn.Module, name: str, inner: Callable[..., Any] | None) -> Callable[..., Any]:
    """The method that one of our functions calls: the replaced one, or that of the class."""
    # Not a bound method: pickle would look that up by its name, and find our function.
    return inner or partial(getattr(type(module), name), module)
