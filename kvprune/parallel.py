"""Tensor parallel models: what the processes that share a model must agree on.

Each process holds some of the heads, and their slots. What it decides for a head is its own
affair. What enters a layer must come out the same everywhere, or shapes part ways; and a
policy that keeps one set for all heads of a layer means those of all processes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .policy import Ranking


def process_group(model: nn.Module) -> Any:
    """The processes that share a model's heads (`tp_plan="auto"`); None if it is one alone."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    named = "tp" in (mesh.mesh_dim_names or ())
    return mesh["tp"].get_group() if named else mesh.get_group()


def agreed(ranking: Ranking, group: Any) -> Ranking:
    """The ranking that all processes of `group` go by, from each one's own.

    The score is the mean over the processes (of as many heads each); what any protects is
    protected, and the largest budget holds.
    """
    score = ranking.score.clone()
    dist.all_reduce(score, group=group)
    score /= dist.get_world_size(group)
    protected, budget = (_largest(t, group) for t in (ranking.protected, ranking.budget))
    return replace(ranking, score=score, protected=protected.bool(), budget=budget)


def any_process(found: Tensor, group: Any) -> Tensor:
    """Where some process of `group` found something; `found` is bool."""
    return _largest(found, group).bool()


def _largest(values: Tensor, group: Any) -> Tensor:
    values = values.to(torch.int64, copy=True)
    dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values
