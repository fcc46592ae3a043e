"""The oracle of hidden-state pruning: a dense model in which dropped tokens are masked out.

An unattached sdpa model reads the whole sequence anew for every forward, with no cache. From
the stage where a token was dropped, no query attends to it any more; what it computes itself
is thrown away. Selection is written out token by token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvprune.families import attention_of, decoder_layers
from kvprune.policies import SDTP

from .models import positions
from .oracles import budget_oracle


@dataclass
class MaskedDense:
    """One batch of sequences under SDTP; all shapes `[B, columns]` over everything read.

    `alive` says by layer who reached it, `entered` what hidden states `[B, columns, C]` came to
    it in the last forward.
    """

    model: Any
    policy: SDTP
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    mask: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    alive: list[Tensor] = field(default_factory=list)
    entered: dict[int, Tensor] = field(default_factory=dict)

    def forward(self, ids: Tensor, mask: Tensor, asked: int = 1) -> Tensor:
        """Reads new tokens; `asked` of them, at the end, are protected. Logits `[B, Q, V]`."""
        rows, count = ids.shape
        if not self.alive:
            self.ids, self.mask = ids[:, :0], mask[:, :0]
            layers = self.model.config.num_hidden_layers
            self.alive = [torch.zeros(rows, 0, dtype=torch.bool)] * layers
        self.ids, self.mask = torch.cat([self.ids, ids], 1), torch.cat([self.mask, mask], 1)
        self.alive = [torch.cat([a, mask.bool()], 1) for a in self.alive]
        with torch.no_grad(), _Hooks(self, count, asked):
            output = self.model(
                self.ids,
                attention_mask=self.mask,
                position_ids=positions(self.mask),
                use_cache=False,
            )
        return output.logits[:, -count:]

    def decide(self, layer: int, hidden: Tensor, count: int, asked: int) -> None:
        """Drops new tokens from `layer` on, given the whole hidden states `[B, columns, C]`."""
        self.entered[layer] = hidden
        p, heads = self.policy, self.policy.heads
        assert heads is not None
        stage, rest = divmod(layer - p.first_layer, p.every)
        if count == 1 or rest or not 0 <= stage < len(heads.stages):
            return
        scores = heads(hidden, stage)
        for row in range(hidden.shape[0]):
            new = range(hidden.shape[1] - count, hidden.shape[1])
            length = sum(int(self.mask[row, c]) for c in new)
            if length < p.min_tokens:
                continue
            present = [c for c in new if self.alive[layer][row, c]]
            stay = self._stay(row, stage, present, length, scores[row], new[-asked:])
            for deeper in self.alive[layer:]:
                for column in set(present) - stay:
                    deeper[row, column] = False

    def _stay(
        self, row: int, stage: int, present: list[int], length: int, score: Tensor, asked: Any
    ) -> set[int]:
        p, first = self.policy, int(self.mask[row].nonzero()[0, 0])
        local = budget_oracle(p.local, length)
        protected = {c for c in present if c < first + p.sinks or c in asked}
        protected |= set(present[len(present) - local :])
        budget = max(budget_oracle(p.keep ** (stage + 1), length), len(protected))
        rest = sorted(set(present) - protected, key=lambda c: (float(score[c]), c), reverse=True)
        return protected | set(rest[: budget - len(protected)])

    def columns(self, layer: int, row: int) -> list[int]:
        """The columns that reached `layer`."""
        return self.alive[layer][row].nonzero().flatten().tolist()


class _Hooks:
    """While open, decides before each layer and masks in each attention."""

    def __init__(self, dense: MaskedDense, count: int, asked: int) -> None:
        self.dense, self.count, self.asked = dense, count, asked
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        base = self.dense.model.base_model
        for index, layer in enumerate(decoder_layers(base)):
            attention = attention_of(base, layer)
            for module, hook in ((layer, self._before_layer), (attention, self._before_attention)):
                bound = self._bound(hook, index)
                self.handles.append(module.register_forward_pre_hook(bound, with_kwargs=True))

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _bound(self, hook: Any, index: int) -> Any:
        return lambda module, args, kwargs: hook(index, args, kwargs)

    def _before_layer(self, index: int, args: Any, kwargs: Any) -> None:
        self.dense.decide(index, args[0], self.count, self.asked)

    def _before_attention(self, index: int, args: Any, kwargs: Any) -> Any:
        alive = self.dense.alive[index][:, None, None, :]
        mask = kwargs["attention_mask"]
        if mask is None:
            size = alive.shape[-1]
            mask = torch.ones(size, size, dtype=torch.bool).tril()
        return args, {**kwargs, "attention_mask": mask & alive}
