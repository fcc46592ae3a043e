"""The marking pass: hidden states and saliency of examples in the dense model, kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from kvprune.errors import KVPruneError
from kvprune.files import write_whole

from .examples import Example
from .shipped import weights_digest
from .targets import TARGETS, can_continue, hidden_states


@dataclass(frozen=True)
class Mark:
    """The marking pass of one example, for the n tokens of its prompt alone.

    Attributes:
        hidden: `[S, n, C]`, the stages' inputs in the dense model, in its dtype.
        saliency: `[S, n]` float32; see `Marks`.
    """

    hidden: Tensor
    saliency: Tensor


@dataclass(frozen=True)
class Marks:
    """The marks of a model's examples, which heads learn from; each mark is computed once.

    Args:
        model: the attached model.
        layers: the layers that the stages stand before.
        folder: the folder that saliency is kept in (4 bytes per token and stage).
        target: the kind of saliency, see `TARGETS`.
        keep_hidden: whether hidden states are kept there as well (C times as much), which spares
            each further epoch, and each further training on the same examples, a forward of the
            model. Where the target can be computed after a cache (see `can_continue`), the tokens
            that examples share are kept once, and are also read once if these examples are marked
            one after the other.
        precision: the autocast that the forwards run under, which the numbers depend on.
    """

    model: Any
    layers: Sequence[int]
    folder: Path
    target: str
    keep_hidden: bool = False
    precision: str = "no"

    def of(self, example: Example) -> Mark:
        """The mark of an example; the parts of it that are on disk are read from there."""
        known = self._known(example)
        if "hidden" not in known:
            known |= self._made(example, known)
            self._keep(example, known)
            known = self._whole(example, known)
        device = self.model.device
        return Mark(known["hidden"].to(device), known["saliency"].to(device))

    def ensure(self, example: Example) -> None:
        """Marks an example, unless everything that is to be kept of its mark is on disk."""
        known = self._known(example)
        if not known or (self.keep_hidden and "hidden" not in known):
            self.of(example)

    def saliency(self, example: Example) -> Tensor:
        """The saliency of an example's mark; needs no forward if the saliency is on disk."""
        known = self._known(example)
        return known["saliency"].to(self.model.device) if known else self.of(example).saliency

    def _made(self, example: Example, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """Computes `hidden`, and `saliency` if it is not known yet.

        `hidden` lacks the shared beginning where that is kept in a file of its own.
        """
        size = len(example.prompt)
        whole = example.prompt + example.completion
        ids = torch.tensor([whole], device=self.model.device)
        if self.keep_hidden and example.shared and can_continue(self.model, self.target):
            inputs, saliency = self._continued(example, ids)
        elif known:
            inputs, saliency = hidden_states(self.model, self.layers, ids), known["saliency"]
        else:
            inputs, saliency = TARGETS[self.target](self.model, self.layers, ids, size, None)
        # The completion's tokens at the end are cut off: a mark is of the prompt alone.
        hidden = torch.stack([x.detach()[0, : size - len(whole) + x.shape[1]] for x in inputs])
        return {"hidden": hidden} if known else {"hidden": hidden, "saliency": saliency}

    def _known(self, example: Example) -> dict[str, Tensor]:
        path = self._path(example)
        return self._whole(example, _read(path, "saliency")) if path.exists() else {}

    def _whole(self, example: Example, mark: dict[str, Tensor]) -> dict[str, Tensor]:
        """Puts the hidden states of a beginning that has a file of its own in front of the others.

        The mark is left without any hidden states if that file is gone.
        """
        apart = len(example.prompt) - mark["hidden"].shape[1] if "hidden" in mark else 0
        if not apart:
            return mark
        rest, path = mark.pop("hidden"), self._named(example.prompt[:apart])
        if not path.exists():
            return mark
        return {**mark, "hidden": torch.cat([_read(path, "hidden")["hidden"].to(rest), rest], 1)}

    def _keep(self, example: Example, mark: dict[str, Tensor]) -> None:
        path = self._path(example)
        kept = {n: t.cpu() for n, t in mark.items() if n == "saliency" or self.keep_hidden}
        # Saliency that is on disk already is not written again.
        if self.keep_hidden or not path.exists():
            _check_finite(mark["saliency"])
            write_whole(path, lambda scratch: save_file(kept, scratch))

    def _path(self, example: Example) -> Path:
        return self._named(self.target, example.prompt, example.completion)

    def _named(self, *what: Any) -> Path:
        said = repr((self._model, tuple(self.layers), *what))
        return self.folder / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.safetensors"

    @cached_property
    def _model(self) -> tuple[str, ...]:
        config = {**self.model.config.to_dict(), "_name_or_path": None}
        return weights_digest(self.model), repr(sorted(config.items())), self.precision

    def _continued(self, example: Example, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """The target's result for an example, computed after a cache of its shared beginning."""
        shared, rest = example.shared, len(example.prompt) - example.shared
        beginning = example.prompt[:shared]
        # Taken out while it also holds the example, so that an error leaves no such cache behind.
        cache = self._last.pop(beginning, None) or self._begun(beginning)
        made = TARGETS[self.target](self.model, self.layers, ids[:, shared:], rest, cache)
        cache.crop(shared - ids.shape[1])
        self._last.clear()
        self._last[beginning] = cache
        return made

    def _begun(self, beginning: tuple[int, ...]) -> DynamicCache:
        """A stock cache of a shared beginning, whose hidden states are written to disk."""
        cache, ids = DynamicCache(), torch.tensor([beginning], device=self.model.device)
        hidden = torch.stack([x[0] for x in hidden_states(self.model, self.layers, ids, cache)])
        kept = {"hidden": hidden.detach().cpu()}
        write_whole(self._named(beginning), lambda scratch: save_file(kept, scratch))
        return cache

    # The cache of the beginning that was read last, by the ids of that beginning.
    @cached_property
    def _last(self) -> dict[tuple[int, ...], DynamicCache]:
        return {}


def standardised(saliency: Tensor, sinks: int, signed: bool) -> Tensor:
    """The values that heads are trained to give: zero mean and unit variance per stage.

    Args:
        saliency: `[S, n]`.
        sinks: how many first tokens to leave out, since they are always kept and dwarf all others.
        signed: whether the values are the saliency as it is, and not the logarithm of its
            magnitude.

    Returns:
        `[S, n - sinks]`.
    """
    rest = saliency[:, sinks:]
    size = rest.abs()
    # Many are exactly 0, without a logarithm; a hundredth of the mean is as good as 0.
    values = rest if signed else (size + size.mean(1, keepdim=True) / 100 + 1e-30).log()
    return (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True).clamp(min=1e-6)


def _check_finite(saliency: Tensor) -> None:
    if not bool(saliency.isfinite().all()):
        raise KVPruneError(
            "the marking pass of an example is not finite: the model has NaN weights, or overflows "
            "in its dtype. Load it in float32"
        )


def _read(path: Path, wanted: str) -> dict[str, Tensor]:
    try:
        kept = load_file(path)
    except (OSError, SafetensorError) as error:
        raise KVPruneError(f"{path}: expected a mark, got {error}; remove it") from error
    if wanted not in kept:
        raise KVPruneError(f"{path}: expected a mark, got {sorted(kept)}; remove it")
    return kept
