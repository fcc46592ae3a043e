"""Run by test_parallel.py, in one process or as one of two: prints what comes out as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import kvprune
from kvprune.policies import (
    H2O,
    TOVA,
    ExpectedAttention,
    FastKV,
    KeyDiff,
    ObservedAttention,
    PyramidKV,
    SnapKV,
    StreamingLLM,
)
from kvprune.policy import SlotView, TokenView
from kvprune.statistics import Attention
from kvprune.storage.layout import parting_at_once

from .models import LAYERS, left_padded, prompt
from .strategies import sdtp_pruner
from .uneven import Threshold


@dataclass(frozen=True, repr=False)
class HeadShared(kvprune.TokenPolicy):
    """What all heads together attended to most stays, in every head, and among the tokens."""

    budget: int = 8

    statistics = (Attention(),)
    shares_heads = True

    def rank_hidden(self, tokens: TokenView) -> kvprune.Ranking | None:
        """By what came of the layer before."""
        if tokens.layer == 0:
            return None
        score = tokens.statistic(Attention()).mean(1, keepdim=True)
        return self._ranking(score, 3 * self.budget - 2 * tokens.layer)

    def rank_slots(self, slots: SlotView) -> kvprune.Ranking:
        """By what was received so far."""
        return self._ranking(slots.statistic(Attention()).mean(1, keepdim=True), self.budget)

    def _ranking(self, score: torch.Tensor, budget: int) -> kvprune.Ranking:
        protected = torch.zeros_like(score, dtype=torch.bool)
        return kvprune.Ranking(score, protected, torch.full((len(score),), budget))


PIPELINES: dict[str, list[kvprune.TokenPolicy]] = {
    "h2o": [H2O(4, 4)],
    "sdtp, h2o": [sdtp_pruner(0.6), H2O(4, 4)],
    "streaming": [StreamingLLM(2, 6)],
    "threshold": [Threshold(0.6, 2)],
    "tova": [TOVA(8)],
    "snapkv, tova": [SnapKV(12, window=4), TOVA(8)],
    "snapkv": [SnapKV(12, window=4)],
    "pyramidkv": [PyramidKV(12, window=4)],
    "keydiff": [KeyDiff(12)],
    "observed attention": [ObservedAttention(8, when=3)],
    "expected attention": [ExpectedAttention(8, sinks=2, when=3)],
    "fastkv": [FastKV(0.5, window=4, layer=1)],
    "head-shared": [HeadShared()],
    "head-shared | streaming": [HeadShared() | StreamingLLM(2, 4)],
}


def report(model: PreTrainedModel) -> dict[str, object]:
    """Tokens and kept columns by layer and head of this process."""
    found: dict[str, object] = {}
    for name, policies in PIPELINES.items():
        cache = kvprune.ComposedCache(policies)
        inputs = left_padded(prompt(2, 30), [0, 7])
        generate: Any = model.generate
        # Each process by itself says which of its heads and rows stand apart.
        with parting_at_once():
            tokens = generate(**inputs, cache=cache, max_new_tokens=8, do_sample=False)
        heads = cache.layers[0].keys.shape[1]
        each = [cache.columns(i).expand(-1, heads, -1).tolist() for i in range(LAYERS)]
        columns = [[[[c for c in h if c >= 0] for h in row] for row in layer] for layer in each]
        found[name] = {"tokens": tokens.tolist(), "columns": columns}
    return found


def main(path: str, out: str) -> None:
    """As torchrun starts it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    parallel = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, distributed_config=parallel
    )
    with open(f"{out}.{torch.distributed.get_rank()}", "w") as file:
        json.dump(report(kvprune.attach(model)), file)
    # A process that just ends closes connections which the other may still read from.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
