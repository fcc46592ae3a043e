"""What heads for Saliency learn from: features of a prompt's slots, and what is looked at later.

A prompt is read, all but its last token; then that token and its completion. What the queries of
the completion give to a slot, the most over these queries, times the norm of the slot's value, is
what heads are to tell: with the slots that are best by it, hardly anything of an answer is lost.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvprune.cache.composed import ComposedCache
from kvprune.errors import KVPruneError
from kvprune.files import write_whole
from kvprune.models.structure import base_of, unwrapped
from kvprune.policy import SlotView, TokenPolicy
from kvprune.statistics import Queries

from ..sdtp.examples import Example
from ..sdtp.shipped import weights_digest
from .features import LEAST, PLACES, of_places, of_slots


@dataclass(frozen=True)
class Seen:
    """One prompt of N tokens: for each layer, by its number, its S slots.

    features: `[Hkv, f, S]` float16, see `features`.
    columns: `[S]` int64.
    wanted: `[Hkv, S]` float16, logarithms; only of layers whose queries see everything.
    places: `[4, N]` float32.
    """

    features: dict[int, Tensor]
    columns: dict[int, Tensor]
    wanted: dict[int, Tensor]
    places: Tensor

    def save(self, path: Path) -> None:
        """Writes it to a file."""
        named = {"features": self.features, "columns": self.columns, "wanted": self.wanted}
        tensors = {f"{n}.{i}": t.clone() for n, each in named.items() for i, t in each.items()}
        tensors["places"] = self.places.contiguous()
        write_whole(path, lambda scratch: save_file(tensors, scratch))

    @classmethod
    def load(cls, path: Path) -> Seen:
        """Reads what `save` wrote."""
        named: dict[str, dict[int, Tensor]] = {"features": {}, "columns": {}, "wanted": {}}
        tensors = load_file(path)
        places = tensors.pop("places")
        for name, tensor in tensors.items():
            kind, _, layer = name.partition(".")
            named[kind][int(layer)] = tensor
        return cls(**named, places=places)


class _Notes(TokenPolicy):
    """Keeps everything, and takes notes of all layers in a prompt, and in what is read behind it.

    Attributes:
        features: in the prompt, for each layer the columns `[S]` of its slots, and their features.
        places: in the prompt, `[4, N]`.
        wanted: behind it, the same of what its queries look at; layers without a window alone.
        after: how many tokens are read behind the prompt; 0 while that is read.
    """

    def __init__(self, queries: int, near: int) -> None:
        super().__init__()
        self.queries, self.near = queries, near
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self.features: dict[int, tuple[Tensor, Tensor]] = {}
        self.wanted: dict[int, tuple[Tensor, Tensor]] = {}
        self.places = torch.empty(0)
        self.after = 0

    @property
    def statistics(self) -> tuple[Queries, ...]:
        """The newest queries."""
        return (Queries(self.queries),)

    def rank_layers(self, layers: Sequence[SlotView]) -> None:
        """Takes notes."""
        # A layer with a window has empty slots.
        there = {view.layer: view.valid[0, 0] for view in layers}
        here = {view.layer: view.columns[0, 0, there[view.layer]].cpu() for view in layers}
        if self.after:
            short = min(int((mine >= self.places.shape[1]).sum()) for mine in here.values())
            if short < self.after:
                raise KVPruneError(
                    f"train_saliency: of {self.after} tokens behind a prompt {short} reach the "
                    f"last layer: expected policies that prune long prompts alone, as "
                    f"SDTP(min_tokens=64)"
                )
            for view in layers:
                if view.window is None:
                    self.wanted[view.layer] = here[view.layer], self._wanted(view).cpu()
            return
        self.places = torch.zeros(PLACES, layers[0].seen)
        for view in layers:
            places = of_places(view, torch.float32)[0, :, 0, there[view.layer]]
            self.places[:, here[view.layer]] = places.cpu()
            features = of_slots(view, self.queries, self.near, torch.float32)[0]
            self.features[view.layer] = here[view.layer], features[..., there[view.layer]].cpu()

    def _wanted(self, view: SlotView) -> Tensor:
        """`[Hkv, S]`."""
        given = view.looks(self.queries)[0, :, :, -self.after :].float().sum(1).amax(1)
        return (given * view.values[0].float().norm(dim=-1)).clamp(min=LEAST).log()


@dataclass
class Reader:
    """Reads examples, each once: what was seen is kept in a folder.

    Args:
        model: attached.
        folder: for the files, some megabytes for each thousand tokens.
        pruning: policies that rank hidden states, in front; () for none.
        queries, near: see `SaliencyHeads`.
    """

    model: Any
    folder: Path
    pruning: tuple[TokenPolicy, ...]
    queries: int
    near: int
    _last: tuple[tuple[int, ...], ComposedCache] | None = field(default=None, init=False)

    def of(self, example: Example) -> Path:
        """The file of an example, written if it is not there."""
        path = self.folder / f"{self._name(example)}.safetensors"
        if not path.exists():
            self._read(example).save(path)
        return path

    def _name(self, example: Example) -> str:
        said = repr((self._facts, self.queries, self.near, example.prompt, example.completion))
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    @cached_property
    def _facts(self) -> tuple[Any, ...]:
        """What tells the model, and the policies with their weights, from others."""
        base = base_of(unwrapped(self.model))
        pruning = [policy.for_model(base) for policy in self.pruning]
        fields = [value for policy in pruning for value in vars(policy).values()]
        modules = [weights_digest(value) for value in fields if isinstance(value, nn.Module)]
        config = {**self.model.config.to_dict(), "_name_or_path": None}
        return weights_digest(self.model), repr(sorted(config.items())), repr(pruning), modules

    @torch.no_grad()
    def _read(self, example: Example) -> Seen:
        lead, after = example.prompt[:-1], (example.prompt[-1], *example.completion[:-1])
        # Few enough for policies that prune long prompts alone.
        after = after[: self.queries // 2]
        cache, start = self._begun(example)
        (notes,) = (policy for policy in cache.policies if isinstance(policy, _Notes))
        notes.clear()
        self._forward(cache, lead[start:])
        notes.after = len(after)
        self._forward(cache, after)
        wanted = {}
        for layer, (columns, found) in notes.wanted.items():
            by_column = found.new_zeros(found.shape[0], len(lead) + len(after))
            by_column[:, columns] = found
            wanted[layer] = by_column[:, notes.features[layer][0]].half()
        return Seen(
            {layer: features.half() for layer, (_, features) in notes.features.items()},
            {layer: columns for layer, (columns, _) in notes.features.items()},
            wanted,
            notes.places,
        )

    def _begun(self, example: Example) -> tuple[ComposedCache, int]:
        """A cache that has read what an example shares with the last one, and how long that is.

        As many tokens as look are read anew, and all of them before policies that prune.
        """
        shared = 0 if self.pruning else max(0, example.shared - self.queries)
        beginning = example.prompt[:shared]
        if not beginning:
            return self._new(), 0
        if self._last is None or self._last[0] != beginning:
            cache = self._new()
            self._forward(cache, beginning)
            self._last = beginning, cache
        return copy.deepcopy(self._last[1]), shared

    def _new(self) -> ComposedCache:
        return ComposedCache([*self.pruning, _Notes(self.queries, self.near)])

    def _forward(self, cache: ComposedCache, tokens: Sequence[int]) -> None:
        ids = torch.tensor([list(tokens)], device=self.model.device)
        self.model(ids, past_key_values=cache, logits_to_keep=1)
