"""The learned module of Saliency: how much each key/value head needs each token of a prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kvprune.errors import KVPruneError
from kvprune.files import make_folder, write_whole

from .features import GROUPS, NEAR, PLACES, QUERIES

FORMAT = "kvprune.SaliencyHeads"
WEIGHTS = "saliency.safetensors"
STEP, LEAST_SCALE = 6.0, 1e-2
"""Features are standardised, by a scale no smaller, and cut at so many standard deviations."""

Layer = tuple[int, Tensor, Tensor]
"""A layer's number, and of its slots features `[B, Hkv, f, S]` and tokens `[B, 1|Hkv, S]`."""


class SaliencyHeads(nn.Module):
    """A network of a token's features in all layers, with an output for each layer and head.

    Every layer adds its part to a state of each token; neighbours exchange theirs (a convolution
    by channel over the `kernel` tokens around), and a layer's output is of that state and of what
    the head itself gave the token.

    Args:
        shape: for each layer the key/value heads that its slots have, and the query heads of one.
        width: of a token's state.
        kernel: an odd number of tokens.
        queries: how many of a prompt's newest queries look at it.
        near: how many of these make a group of their own.
        fingerprint: of the model that they are for; see `fingerprint`.

    Raises:
        KVPruneError: a number below 1, or an even kernel.
    """

    place_mean: Tensor
    place_scale: Tensor

    def __init__(
        self,
        shape: Sequence[tuple[int, int]],
        width: int = 128,
        kernel: int = 9,
        queries: int = QUERIES,
        near: int = NEAR,
        fingerprint: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        numbers = {"width": width, "kernel": kernel, "queries": queries, "near": near}
        for name, number in numbers.items():
            if type(number) is not int or number < 1 or (name == "kernel" and number % 2 == 0):
                odd = "an odd" if name == "kernel" else "a whole"
                raise KVPruneError(
                    f"SaliencyHeads: {name}={number!r}: expected {odd} number of at least 1"
                )
        self.shape = tuple((heads, group) for heads, group in shape)
        self.queries, self.near = queries, near
        self.configuration: dict[str, Any] = {
            "shape": [list(each) for each in self.shape],
            **numbers,
            "fingerprint": fingerprint,
        }
        self.layers = nn.ModuleList(_Layer(*each, width) for each in self.shape)
        self.place = nn.Linear(PLACES, width)
        self.register_buffer("place_mean", torch.zeros(PLACES))
        self.register_buffer("place_scale", torch.ones(PLACES))
        self.neighbours = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.middle = nn.Linear(width, width)
        for parameter in self.neighbours.parameters():
            nn.init.zeros_(parameter)

    def forward(self, layers: Iterable[Layer], places: Tensor, there: Tensor) -> list[Tensor]:
        """The scores of all slots, `[B, Hkv, S]` for each of the layers that are given.

        Args:
            layers: in order; tokens are counted from 0 in each row, and N is where a slot is empty.
            places: `[B, 4, N]`, what the places of tokens say.
            there: `[B, N]` bool, the tokens of which something is known.

        Raises:
            KVPruneError: a layer with other heads.
        """
        rows, _, count = places.shape
        place = (places - self.place_mean[:, None]) / self.place_scale[:, None]
        state = self.place(place.clamp(-STEP, STEP).transpose(1, 2))
        # The last place takes what is of no token.
        state = torch.cat([state, state.new_zeros(rows, 1, state.shape[-1])], 1)
        own, columns = [], []
        for number, features, where in layers:
            layer = cast(_Layer, self.layers[number])
            if features.shape[1:3] != layer.mean.shape:
                raise KVPruneError(
                    f"SaliencyHeads: layer {number} has {features.shape[1]} key/value heads with "
                    f"{features.shape[2]} features: expected {list(layer.mean.shape)}, as in the "
                    f"model that the heads are for. Train heads for this one: kvprune "
                    f"train-saliency"
                )
            given, alone = layer.read(features, where.shape[1] == 1)
            index = where.flatten(1)[..., None].expand(-1, -1, state.shape[-1])
            state = state.scatter_add(1, index, given.flatten(1, 2))
            own.append((layer, alone))
            columns.append(where)
        state = F.gelu(state[:, :count].masked_fill(~there[..., None], 0))
        state = state + self.neighbours(state.transpose(1, 2)).transpose(1, 2)
        state = state + F.gelu(self.middle(state))
        state = torch.cat([state, state.new_zeros(rows, 1, state.shape[-1])], 1)
        found = []
        for (layer, alone), where in zip(own, columns, strict=True):
            mixed = layer.out(state).transpose(1, 2)
            found.append(alone + mixed.gather(2, where.expand_as(alone)))
        return found

    @torch.no_grad()
    def standardise(self, features: Mapping[int, Tensor], places: Tensor) -> None:
        """Sets means and scales to those of examples.

        Args:
            features: by layer, `[Hkv, f, n]`.
            places: `[4, n]`.
        """
        for number, each in features.items():
            layer = cast(_Layer, self.layers[number])
            layer.mean.copy_(each.mean(-1))
            layer.scale.copy_(each.std(-1).clamp(min=LEAST_SCALE))
        self.place_mean.copy_(places.mean(-1))
        self.place_scale.copy_(places.std(-1).clamp(min=LEAST_SCALE))

    def save(self, folder: str | PathLike[str]) -> None:
        """Writes them into a folder, where SDTP's heads may be as well.

        Raises:
            KVPruneError: the folder cannot be written.
        """
        place = Path(folder)
        make_folder(place)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        header = {"format": FORMAT, "configuration": json.dumps(self.configuration)}
        write_whole(place / WEIGHTS, lambda scratch: save_file(tensors, scratch, header))

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> SaliencyHeads:
        """Reads what `save` wrote; in eval mode, in float32.

        Raises:
            KVPruneError: no such file, or one without these heads.
        """
        path = Path(folder) / WEIGHTS
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header.get("format") != FORMAT:
                raise ValueError(f"its header says format={header.get('format')!r}")
            # On the meta device nothing is drawn from the user's random numbers.
            with torch.device("meta"):
                heads = cls(**json.loads(header["configuration"]))
            heads.load_state_dict(tensors, assign=True)
        # safetensors and JSON raise errors of many classes.
        except Exception as error:
            raise KVPruneError(
                f"{path}: expected heads that SaliencyHeads.save wrote: {error}"
            ) from error
        return heads.float().eval().requires_grad_(False)


class _Layer(nn.Module):
    """The part of one layer: what its features add to a token's state, and its output."""

    mean: Tensor
    scale: Tensor

    def __init__(self, heads: int, group: int, width: int) -> None:
        super().__init__()
        size = GROUPS * group + 1
        self.register_buffer("mean", torch.zeros(heads, size))
        self.register_buffer("scale", torch.ones(heads, size))
        self.state = nn.Parameter(torch.randn(heads, size, width) * 0.03)
        self.alone = nn.Parameter(torch.full((heads, size), 0.1))
        self.out = nn.Linear(width, heads)
        nn.init.zeros_(self.out.weight)

    def read(self, features: Tensor, together: bool) -> tuple[Tensor, Tensor]:
        """What features `[B, Hkv, f, S]` add to states, and what they say by themselves.

        Args:
            features: of the layer's slots.
            together: whether a slot of all heads is of one token.

        Returns:
            `[B, 1|Hkv, S, width]`, added up over the heads where `together`; `[B, Hkv, S]`.
        """
        standard = (features - self.mean[:, :, None]) / self.scale[:, :, None]
        standard = standard.clamp(-STEP, STEP)
        sum_of = "bhfs,hfw->bsw" if together else "bhfs,hfw->bhsw"
        given = torch.einsum(sum_of, standard, self.state)
        alone = torch.einsum("bhfs,hf->bhs", standard, self.alone)
        return given[:, None] if together else given, alone
