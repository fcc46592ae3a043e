"""Gates: a small module for each layer, and their files."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvprune.errors import KVPruneError
from kvprune.files import make_folder, write_whole

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SIZES = ("input_dim", "output_dim", "n_modules")


class KVzapGates(nn.Module):
    """For each layer a linear map, or two with a GELU between, to a number for each head.

    Args:
        layers: how many.
        inputs: the size of a hidden state, C.
        heads: the key/value heads of a layer, Hkv.
        hidden: the numbers between two linear maps; None for one map.
        model: `architecture` of the model that they are for; None where a file does not say.
    """

    def __init__(
        self,
        layers: int,
        inputs: int,
        heads: int,
        hidden: int | None = 512,
        model: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.inputs, self.heads, self.hidden, self.model = inputs, heads, hidden, model

        def gate() -> nn.Module:
            if hidden is None:
                return nn.Linear(inputs, heads)
            return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, heads))

        self.layers = nn.ModuleList(gate() for _ in range(layers))

    def forward(self, states: Tensor, layer: int) -> Tensor:
        """The scores `[B, Hkv, Q]` of tokens, from what enters a layer's attention `[B, Q, C]`."""
        found: Tensor = self.layers[layer](states).transpose(1, 2)
        return found

    def save(self, folder: str | PathLike[str]) -> None:
        """Writes them in the form in which those of the paper are published.

        Raises:
            KVPruneError: the folder cannot be written.
        """
        place = Path(folder)
        make_folder(place)
        config = {
            "model_type": "kvzap",
            "input_dim": self.inputs,
            "output_dim": self.heads,
            "hidden_dim": self.hidden,
            "n_modules": len(self.layers),
            "model": self.model,
        }
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()
        }
        write_whole(place / WEIGHTS, lambda scratch: save_file(tensors, scratch, {"format": "pt"}))
        text = json.dumps(config, indent=2)
        write_whole(place / CONFIG, lambda scratch: Path(scratch).write_text(text))

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> KVzapGates:
        """Gates out of a local folder: what `save` wrote, or those that the authors publish.

        Raises:
            KVPruneError: there are no such files, or they do not hold gates.
        """
        place = Path(folder)
        try:
            config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(place / WEIGHTS)
        except (OSError, ValueError, RuntimeError) as error:
            raise _no_gates(place, f"{type(error).__name__}: {error}") from error
        except Exception as error:
            # safetensors has an error class of its own for damaged files.
            raise _no_gates(place, str(error)) from error
        kind = config.get("model_type") if isinstance(config, dict) else None
        if kind != "kvzap" or any(type(config.get(name)) is not int for name in SIZES):
            raise _no_gates(place, f"{CONFIG} has model_type {kind!r} or lacks {', '.join(SIZES)}")
        sizes = config["n_modules"], config["input_dim"], config["output_dim"]
        gates = cls(*sizes, config.get("hidden_dim"), config.get("model"))
        try:
            gates.load_state_dict(tensors)
        except RuntimeError as error:
            raise _no_gates(place, str(error)) from error
        return gates.float().eval().requires_grad_(False)


def _no_gates(place: Path, what: str) -> KVPruneError:
    return KVPruneError(
        f"{place}: expected a folder with {CONFIG} and {WEIGHTS} of KVzap's gates, as "
        f"kvprune train-gates writes it or as they are published: {what}"
    )
