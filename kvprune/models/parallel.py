"""Tensor parallel models: the processes that share a model."""

from __future__ import annotations

from typing import Any

from torch import nn


def process_group(model: nn.Module) -> Any:
    """The processes that share a model's heads (`tp_plan="auto"`); None if it is one alone."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    named = "tp" in (mesh.mesh_dim_names or ())
    return mesh["tp"].get_group() if named else mesh.get_group()
