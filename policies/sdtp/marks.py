"""The marking pass: what the dense model says of each example's tokens, kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvprune.errors import KVPruneError
from kvprune.families import attention_of, decoder_layers
from kvprune.files import write_whole
from kvprune.masks import additive

from .examples import Example
from .saliency import contribution, layer_inputs
from .shipped import fingerprint

TARGETS = ("attention", "gradient")


@dataclass(frozen=True)
class Mark:
    """One example's marking pass, its prompt's n tokens alone.

    hidden: `[S, n, C]`, the stages' inputs in the dense model, in its dtype.
    saliency: `[S, n]` float32; see `Marks`.
    """

    hidden: Tensor
    saliency: Tensor


@dataclass(frozen=True)
class Marks:
    """What heads are to learn of a model's examples; each is computed once.

    model: attached. layers: the stages'. folder: where saliency is kept (4 bytes per token and
    stage); hidden states are computed anew, which takes a plain forward.
    target: "gradient" is the paper's, gradient times input (see `saliency`), signed.
    "attention" is what the completion's tokens attend to in the stage's layer and all deeper ones,
    the mean over heads and queries, summed over layers: what a token that is dropped there takes
    with it. It costs a forward instead of a forward and a backward, and is far less noisy.
    """

    model: Any
    layers: Sequence[int]
    folder: Path
    target: str

    def of(self, example: Example) -> Mark:
        """The mark of an example; its saliency from disk if it is there."""
        path = self.folder / f"{self._key(example)}.safetensors"
        size, device = len(example.prompt), self.model.device
        ids = torch.tensor([example.prompt + example.completion], device=device)
        known = path.exists()
        make = self._hidden if known else _MAKE[self.target].__get__(self)
        inputs, saliency = make(ids, size)
        if known:
            saliency = _read(path)
        else:
            _check_finite(saliency)
            kept = {"saliency": saliency.cpu()}
            write_whole(path, lambda scratch: save_file(kept, scratch))
        hidden = torch.stack([x.detach()[0, :size] for x in inputs])
        return Mark(hidden, saliency.to(device))

    def saliency(self, example: Example) -> Tensor:
        """The mark's saliency alone: without a forward, if it is on disk."""
        path = self.folder / f"{self._key(example)}.safetensors"
        if path.exists():
            return _read(path).to(self.model.device)
        return self.of(example).saliency

    def _key(self, example: Example) -> str:
        model = (fingerprint(self.model), str(self.model.dtype))
        said = repr((model, self.target, tuple(self.layers), example))
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    def _hidden(self, ids: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
        with torch.no_grad(), layer_inputs(self.model, self.layers) as entered:
            self.model.base_model(ids, use_cache=False)
        return [entered[i] for i in self.layers], ids.new_zeros(0)

    def _gradient(self, ids: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
        with torch.enable_grad(), layer_inputs(self.model, self.layers) as entered:
            logits = self.model(ids, use_cache=False).logits
            inputs = [entered[i] for i in self.layers]
            scores = contribution(logits, inputs)[0]
        return inputs, scores[:, :size].contiguous()

    def _attention(self, ids: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
        # The last prompt token is the one that the first token of the completion comes from.
        rows = slice(size - 1, ids.shape[1])
        with watched(self.model, rows) as paid:
            inputs, _ = self._hidden(ids, size)
        layers = torch.stack([paid[i][0, :size] for i in range(len(paid))])
        return inputs, torch.stack([layers[i:].sum(0) for i in self.layers])


_MAKE: dict[str, Callable[..., tuple[list[Tensor], Tensor]]] = {
    "attention": Marks._attention,
    "gradient": Marks._gradient,
}


@contextmanager
def watched(model: Any, rows: slice) -> Iterator[dict[int, Tensor]]:
    """While open, forwards of an attached model without a cache leave here what is attended to.

    Args:
        model: attached.
        rows: the queries that are looked at.

    Yields:
        by layer `[B, N]` float32: the probabilities, their mean over heads and those queries.
    """
    base = model.base_model
    paid = dict[int, Tensor]()
    handles = [
        attention_of(base, layer).register_forward_pre_hook(
            partial(_hand_watcher, partial(_note, paid, index, rows)), with_kwargs=True
        )
        for index, layer in enumerate(decoder_layers(base))
    ]
    try:
        yield paid
    finally:
        for handle in handles:
            handle.remove()


def _hand_watcher(
    watcher: Callable[..., None], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return args, {**kwargs, "kvprune_watch": watcher}


def _note(
    paid: dict[int, Tensor],
    index: int,
    rows: slice,
    eager: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> None:
    if mask is None:
        size = key.shape[2]
        mask = torch.ones(1, 1, size, size, dtype=torch.bool, device=key.device).tril()
    _, probabilities = eager(query[:, :, rows], key, value, additive(mask[:, :, rows], query.dtype))
    paid[index] = probabilities.float().mean((1, 2))


def standardised(saliency: Tensor, sinks: int, signed: bool) -> Tensor:
    """What heads are trained to give: zero mean and unit variance per stage, without the sinks.

    Args:
        saliency: `[S, n]`. sinks: how many first tokens to leave out, since they are always kept
            and dwarf all others. signed: as it is, instead of the logarithm of its magnitude.

    Returns:
        `[S, n - sinks]`.
    """
    rest = saliency[:, sinks:]
    size = rest.abs()
    # A gradient in bfloat16 can be exactly 0.
    values = rest if signed else (size + 1e-8 * size.amax(1, keepdim=True) + 1e-30).log()
    return (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True).clamp(min=1e-6)


def _check_finite(saliency: Tensor) -> None:
    if not bool(saliency.isfinite().all()):
        raise KVPruneError(
            "the marking pass of an example is not finite: the model has NaN weights, or overflows "
            "in its dtype. Load it in float32"
        )


def _read(path: Path) -> Tensor:
    try:
        return load_file(path)["saliency"]
    except (OSError, SafetensorError, KeyError) as error:
        raise KVPruneError(f"{path}: expected a mark, came {error}; remove it") from error
