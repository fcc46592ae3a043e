"""Scores of heads: which of them look far, and their files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvprune.errors import KVPruneError
from kvprune.files import write_whole

FACTS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def architecture(model: Any) -> dict[str, Any]:
    """The facts that tell a model's architecture from others."""
    config = model.config.get_text_config(decoder=True)
    facts = {name: getattr(config, name, None) for name in FACTS}
    # Some families name no key/value heads of their own.
    facts["num_key_value_heads"] = facts["num_key_value_heads"] or facts["num_attention_heads"]
    return facts


@dataclass(frozen=True, eq=False)
class HeadScores:
    """How far each key/value head looks.

    values: `[layers, Hkv]` float32, the higher, the more a head retrieves from far away.
    model: `architecture` of the model; None where a file does not say.
    """

    values: Tensor
    model: dict[str, Any] | None = None

    def streaming(self, share: float) -> dict[int, tuple[int, ...]]:
        """The heads that stream, by layer: so large a share of all, with the lowest scores.

        Ties go to the lower layer, then to the lower head. Heads without a score (infinity), as
        those of layers that hold a state, do not count.
        """
        layers, heads = self.values.shape
        count = round(share * int(self.values.isfinite().sum()))
        lowest = self.values.flatten().argsort(stable=True)[:count].tolist()
        found: dict[int, list[int]] = {layer: [] for layer in range(layers)}
        for place in sorted(lowest):
            found[place // heads].append(place % heads)
        return {layer: tuple(each) for layer, each in found.items()}

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all.

        Raises:
            KVPruneError: it cannot be written.
        """
        metadata = {"kvprune_heads": "1", "model": json.dumps(self.model)}
        tensors = {"scores": self.values.detach().cpu().float().contiguous()}
        write_whole(Path(path), lambda scratch: save_file(tensors, scratch, metadata))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> HeadScores:
        """Scores out of a file.

        Args:
            path: what `save` wrote; or `full_attention_heads.tsv` of the paper's published
                patterns, or the folder that holds it: a line for each layer, a number for each
                head.

        Raises:
            KVPruneError: there is no such file, or it is neither.
        """
        path = Path(path)
        table = path / "full_attention_heads.tsv" if path.is_dir() else path
        if not table.is_file():
            raise KVPruneError(
                f"{path}: expected scores of heads, a file of `kvprune measure-heads` or "
                f"full_attention_heads.tsv, found none"
            )
        try:
            if table.suffix != ".tsv":
                with safe_open(table, framework="pt") as file:
                    model = json.loads(file.metadata()["model"])
                    return cls(file.get_tensor("scores").clone(), model)
            lines = [line.split() for line in table.read_text().splitlines() if line.strip()]
            return cls(torch.tensor([[float(number) for number in line] for line in lines]))
        except Exception as error:
            raise KVPruneError(
                f"{table}: expected scores of heads, a file of `kvprune measure-heads` or "
                f"full_attention_heads.tsv; this one is another, or damaged ({error})"
            ) from error
