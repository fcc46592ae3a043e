"""Counts what torch does: operators by name, and the largest tensor that any of them makes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OpCount(TorchDispatchMode):
    """While active, notes every operator; `big(name)` the largest output of one, in entries."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._largest: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and takes note."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            # Views and in-place operators make nothing.
            if isinstance(tensor, torch.Tensor):
                if tensor.untyped_storage().data_ptr() in given:
                    continue
                self._largest[name] = max(self._largest.get(name, 0), tensor.numel())
        return result

    def big(self, *names: str) -> int:
        """Entries of the largest output of these operators, or of all."""
        chosen = names or tuple(self._largest)
        return max((self._largest.get(name, 0) for name in chosen), default=0)
