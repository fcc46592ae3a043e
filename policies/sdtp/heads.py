"""The learned modules of SDTP: one small MLP per stage, which tells how salient a token is."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kvprune.errors import KVPruneError

FORMAT = "kvprune.SDTPHeads"


class SDTPHeads(nn.Module):
    """One MLP with GELU per stage, hidden -> hidden/4 -> 2 (paper, section 3.2).

    The two outputs are the logits of keeping and of dropping a token; keep minus drop ranks.

    Args:
        hidden_size: C of the model that the heads are for.
        num_layers: how many decoder layers that model has.
        stages: how many heads.

    Raises:
        KVPruneError: a number below 1.
    """

    def __init__(self, hidden_size: int, num_layers: int, stages: int) -> None:
        super().__init__()
        self.configuration = {
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "stages": stages,
        }
        wrong = {k: v for k, v in self.configuration.items() if type(v) is not int or v < 1}
        if wrong:
            raise KVPruneError(f"SDTPHeads: expected whole numbers of at least 1, came {wrong}")
        self.stages = nn.ModuleList(_head(hidden_size) for _ in range(stages))

    def forward(self, hidden: Tensor, stage: int) -> Tensor:
        """How much a stage wants to keep each token.

        Args:
            hidden: `[..., C]`, the input of the stage's layer, of any dtype.
            stage: which head, from 0.

        Returns:
            `[...]` in the heads' dtype: keep-minus-drop logit.
        """
        head = self.stages[stage]
        logits = head(hidden.to(next(head.parameters()).dtype))
        return logits[..., 0] - logits[..., 1]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights and configuration to one safetensors file, whole or not at all."""
        target = Path(path)
        header = {"format": FORMAT, "configuration": json.dumps(self.configuration)}
        descriptor, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(descriptor)
        try:
            tensors = {name: t.contiguous() for name, t in self.state_dict().items()}
            save_file(tensors, scratch, metadata=header)
            os.replace(scratch, target)
        finally:
            Path(scratch).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SDTPHeads:
        """Reads what `save` wrote.

        Raises:
            KVPruneError: no such file, or not a file of SDTP heads.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header.get("format") != FORMAT:
                raise KVPruneError(f"its header says format={header.get('format')!r}")
            heads = cls(**json.loads(header["configuration"]))
            heads.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
        except (
            OSError,
            SafetensorError,
            KVPruneError,
            KeyError,
            TypeError,
            RuntimeError,
            json.JSONDecodeError,
            StopIteration,
        ) as error:
            raise KVPruneError(
                f"SDTPHeads.load({str(path)!r}): expected a file that SDTPHeads.save wrote: {error}"
            ) from error
        return heads


def _head(hidden_size: int) -> nn.Module:
    inner = max(hidden_size // 4, 1)
    return nn.Sequential(nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, 2))
