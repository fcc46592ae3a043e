"""A number that a small module gives to a token when the token is written."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import KVPruneError
from .base import Statistic


@dataclass(frozen=True, repr=False)
class Gate(Statistic):
    """A number for each slot, `[B, Hkv, S]`, out of its token's hidden state.

    It is made once, when the token is written, and does not change.

    Args:
        module: is called as `module(hidden, layer)` with `[B, Q, C]`, what enters decoder layer
            `layer` (before its norm), and returns `[B, 1|Hkv, Q]` floats; for all layers one.

    Raises:
        KVPruneError: not a module of torch.

    Sources: KVzap (arXiv 2601.07891), DMS (arXiv 2506.05345).
    """

    module: nn.Module

    reads: ClassVar[str] = "hidden"
    checked: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise KVPruneError(
                f"Gate({self.module!r}): expected a torch.nn.Module that is called with hidden "
                f"states [B, Q, C] and the number of a layer"
            )
        try:
            inspect.signature(self.module.forward).bind(None, 0)
        except TypeError as error:
            raise KVPruneError(
                f"Gate: {type(self.module).__name__}.forward ({error}): expected one that takes "
                f"hidden states [B, Q, C] and the number of a layer"
            ) from error

    def numbers(self, hidden: Tensor, layer: int) -> Tensor:
        """The module's answer about the tokens that enter a layer."""
        found: Tensor = self.module(hidden, layer)
        return found

    def join(self, held: Tensor, new: Tensor) -> Tensor:
        """Takes the new numbers, where there are any (elsewhere they are NaN)."""
        return torch.where(new.isnan(), held, new)

    def __repr__(self) -> str:
        # A file knows statistics by this: other weights, another gate.
        said = hashlib.sha256(repr(self.module).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            if isinstance(tensor, Tensor):
                whole = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                said.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                said.update(whole.numpy().tobytes())
        return f"Gate({type(self.module).__name__}, {said.hexdigest()[:12]})"
