"""The marking pass: what the dense model says of each example's tokens, kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache

from kvprune.errors import KVPruneError
from kvprune.families import argument, attention_of, decoder_layers, with_argument
from kvprune.files import write_whole
from kvprune.masks import additive, causal

from .examples import Example
from .saliency import contribution, layer_inputs
from .shipped import weights_digest

TARGETS = ("removal", "attention", "gradient")


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
    stage).
    target: what saliency is, see `TARGETS`.
    "gradient" is the paper's, gradient times input (see `saliency`), signed.
    "attention" is what the completion's tokens attend to in the stage's layer and all deeper ones,
    the mean over heads and queries, summed over layers.
    "removal" is by how much the log odds of the completion's tokens fall, to first order, when
    they no longer attend to a token in those layers; 0 where they rise. It is the gradient with
    respect to a bias on the token's attention scores: `sum of a_i (v_i - o) . dT/do` over those
    layers, their heads and queries, with o what a head gives, and T the sum of the log odds, whose
    gradient does not vanish where the model is sure. Of what is attended to, much is of no effect.
    keep_hidden: whether to keep hidden states there as well (C times as much), which spares each
    further epoch, and each further training on the same examples, a forward of the model. What
    examples share is kept once; but for the target "gradient" it is also read once, if they are
    marked one after the other.
    precision: what else the numbers depend on: the autocast that the forwards run under.
    """

    model: Any
    layers: Sequence[int]
    folder: Path
    target: str
    keep_hidden: bool = False
    precision: str = "no"

    def of(self, example: Example) -> Mark:
        """The mark of an example; what of it is on disk is read from there."""
        known = self._known(example)
        if "hidden" not in known:
            known |= self._made(example, known)
            self._keep(example, known)
            known = self._whole(example, known)
        device = self.model.device
        return Mark(known["hidden"].to(device), known["saliency"].to(device))

    def ensure(self, example: Example) -> None:
        """Marks it, if it is not on disk as it is to be."""
        known = self._known(example)
        if not known or (self.keep_hidden and "hidden" not in known):
            self.of(example)

    def saliency(self, example: Example) -> Tensor:
        """The mark's saliency alone: without a forward, if it is on disk."""
        known = self._known(example)
        return known["saliency"].to(self.model.device) if known else self.of(example).saliency

    def _made(self, example: Example, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """`hidden`, of what is not shared if that is kept apart, and `saliency` if not known."""
        size = len(example.prompt)
        whole = example.prompt + example.completion
        if self.keep_hidden and example.shared and self.target != "gradient":
            inputs, saliency = self._continued(example)
        else:
            ids = torch.tensor([whole], device=self.model.device)
            make = self._hidden if known else getattr(self, f"_{self.target}")
            inputs, saliency = make(ids, size)
        hidden = torch.stack([x.detach()[0, : size - len(whole) + x.shape[1]] for x in inputs])
        return {"hidden": hidden} if known else {"hidden": hidden, "saliency": saliency}

    def _known(self, example: Example) -> dict[str, Tensor]:
        path = self._path(example)
        return self._whole(example, _read(path, "saliency")) if path.exists() else {}

    def _whole(self, example: Example, mark: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the hidden states of a beginning that is kept apart; without any, if it is gone."""
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

    def _hidden(
        self, ids: Tensor, size: int, cache: DynamicCache | None = None
    ) -> tuple[list[Tensor], Tensor]:
        with torch.no_grad(), layer_inputs(self.model, self.layers) as entered:
            self.model.base_model(ids, past_key_values=cache, use_cache=cache is not None)
        return [entered[i] for i in self.layers], ids.new_zeros(0)

    def _continued(self, example: Example) -> tuple[list[Tensor], Tensor]:
        """What the target makes of an example, given what it makes of the shared beginning."""
        shared, size = example.shared, len(example.prompt)
        ids = torch.tensor([example.prompt + example.completion], device=self.model.device)
        beginning = example.prompt[:shared]
        # Taken out while it is longer, so that an error leaves no such cache behind.
        cache = self._last.pop(beginning, None) or self._begun(beginning)
        made = getattr(self, f"_{self.target}")(ids[:, shared:], size - shared, cache)
        cache.crop(shared - ids.shape[1])
        layer: Any
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        self._last.clear()
        self._last[beginning] = cache
        return made

    def _begun(self, beginning: tuple[int, ...]) -> DynamicCache:
        """The stock cache of a shared beginning, whose hidden states are kept."""
        cache, ids = DynamicCache(), torch.tensor([beginning], device=self.model.device)
        hidden = torch.stack([x[0] for x in self._hidden(ids, len(beginning), cache)[0]])
        kept = {"hidden": hidden.detach().cpu()}
        write_whole(self._named(beginning), lambda scratch: save_file(kept, scratch))
        return cache

    # The cache of the beginning that was read last.
    @cached_property
    def _last(self) -> dict[tuple[int, ...], DynamicCache]:
        return {}

    def _gradient(self, ids: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
        with torch.enable_grad(), layer_inputs(self.model, self.layers) as entered:
            logits = self.model(ids, use_cache=False).logits
            inputs = [entered[i] for i in self.layers]
            scores = contribution(logits, inputs)[0]
        return inputs, scores[:, :size].contiguous()

    def _attention(
        self, ids: Tensor, size: int, cache: DynamicCache | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """ids: what is not in the cache, of which `size` are of the prompt."""
        before = 0 if cache is None else cache.get_seq_length()
        # The last prompt token is the one that the first token of the completion comes from.
        rows = slice(size - 1, ids.shape[1])
        with watched(self.model, rows) as paid:
            inputs, _ = self._hidden(ids, size, cache)
        layers = torch.stack([paid[i][0, : before + size] for i in range(len(paid))])
        return inputs, torch.stack([layers[i:].sum(0) for i in self.layers])

    def _removal(
        self, ids: Tensor, size: int, cache: DynamicCache | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """As `_attention`; what the completion's tokens come from is read again, to derive by."""
        cache = DynamicCache() if cache is None else cache
        inputs, _ = self._hidden(ids, size, cache)
        last, first = size - 1, min(self.layers)
        cache.crop(last - ids.shape[1])
        with torch.enable_grad(), biased(self.model, first, cache.get_seq_length() + 1) as biases:
            logits = self.model(ids[:, last:], past_key_values=cache, use_cache=True).logits[0, :-1]
            odds = _log_odds(logits.float(), ids[0, size:]).sum()
            layers = torch.stack(torch.autograd.grad(odds, biases))
        return inputs, torch.stack([layers[i - first :].sum(0).clamp(min=0) for i in self.layers])


def _log_odds(logits: Tensor, truth: Tensor) -> Tensor:
    """Of each of the tokens `[m]` against all others, by logits `[m, V]`."""
    index = truth[:, None]
    others = logits.scatter(1, index, -torch.inf).logsumexp(1)
    return logits.gather(1, index)[:, 0] - others


@contextmanager
def biased(model: Any, first: int, count: int) -> Iterator[list[Tensor]]:
    """While open, forwards of one row have a bias of 0 on their attention scores, to derive by.

    Args:
        model: of a family that pruning works for.
        first: the first layer to have one.
        count: how many tokens have one, the first ones, those in a cache included.

    Yields:
        by layer, from `first` on, `[count]` float32.
    """
    layers = decoder_layers(model.base_model)[first:]
    biases = [torch.zeros(count, device=model.device, requires_grad=True) for _ in layers]
    handles = [
        layer.register_forward_pre_hook(partial(_add_bias, bias), with_kwargs=True)
        for layer, bias in zip(layers, biases, strict=True)
    ]
    try:
        yield biases
    finally:
        for handle in handles:
            handle.remove()


def _add_bias(bias: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden = argument(layer, args, kwargs, "hidden_states")
    mask = argument(layer, args, kwargs, "attention_mask")
    if mask is None:
        mask = causal(hidden.shape[1], hidden.shape[1], hidden.device)
    mask = additive(mask, hidden.dtype)
    added = nn.functional.pad(bias, (0, mask.shape[-1] - len(bias))).to(mask.dtype)
    return with_argument(layer, args, kwargs, "attention_mask", mask + added)


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
        mask = causal(query.shape[2], key.shape[2], key.device)
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


def _read(path: Path, wanted: str) -> dict[str, Tensor]:
    try:
        kept = load_file(path)
    except (OSError, SafetensorError) as error:
        raise KVPruneError(f"{path}: expected a mark, came {error}; remove it") from error
    if wanted not in kept:
        raise KVPruneError(f"{path}: expected a mark, came {sorted(kept)}; remove it")
    return kept
