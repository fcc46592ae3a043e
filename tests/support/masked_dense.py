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

from kvprune.models.families import attention_of
from kvprune.models.structure import decoder_layers
from kvprune.policies import SDTP, SDTPHeads

from .models import positions
from .oracles import budget_oracle


@dataclass
class MaskedDense:
    """One batch of sequences under SDTP; all shapes `[B, columns]` over everything read.

    `alive` says by layer who reached it, `entered` what hidden states `[B, columns, C]` got to
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
        assert isinstance(heads, SDTPHeads)
        if count == 1 or layer not in heads.layers[: p.stages]:
            return
        stage = heads.layers.index(layer)
        for row in range(hidden.shape[0]):
            new = range(hidden.shape[1] - count, hidden.shape[1])
            length = sum(int(self.mask[row, c]) for c in new)
            if length < p.min_tokens:
                continue
            present = [c for c in new if self.alive[layer][row, c]]
            stay = self._stay(row, stage, present, length, hidden[row], new[-asked:])
            for deeper in self.alive[layer:]:
                for column in set(present) - stay:
                    deeper[row, column] = False

    def _stay(
        self, row: int, stage: int, present: list[int], length: int, hidden: Tensor, asked: Any
    ) -> set[int]:
        score = self._scores(stage, present, hidden)
        p, first = self.policy, int(self.mask[row].nonzero()[0, 0])
        local = budget_oracle(p.local, length)
        protected = {c for c in present if c < first + p.sinks or c in asked}
        protected |= set(present[len(present) - local :])
        assert isinstance(p.heads, SDTPHeads)
        share = p.heads.keep if p.keep is None else p.keep
        budget = max(budget_oracle(share ** (stage + 1), length), len(protected))
        rest = sorted(set(present) - protected, key=lambda c: (score[c], c), reverse=True)
        return protected | set(rest[: budget - len(protected)])

    def _scores(self, stage: int, present: list[int], hidden: Tensor) -> dict[int, float]:
        """By column, each token by itself; the newest ones that are still there ask."""
        heads: Any = self.policy.heads
        head = heads.stages[stage]
        states = [head.norm(hidden[c]) for c in present]
        features = []
        for state in states:
            keep, drop = head.down(torch.nn.functional.gelu(head.up(state))).tolist()
            asked = []
            for h in range(heads.asks.heads if heads.asks else 0):
                part = slice(h * heads.asks.size, (h + 1) * heads.asks.size)
                key = heads.asks.key(state)[part] * head.scale[h]
                asking = [heads.asks.query(s)[part] for s in states[-heads.query_tokens :]]
                products = torch.stack([key @ q / heads.asks.size**0.5 for q in asking])
                asked.append(float(products.exp().mean().log()))
            features.append([keep - drop, *asked])
        if not heads.asks:
            return {c: f[0] for c, f in zip(present, features, strict=True)}
        weights, half = head.smooth.weight[0], head.smooth.weight.shape[-1] // 2
        score = {}
        for place, column in enumerate(present):
            total = float(head.smooth.bias)
            for other in range(max(place - half, 0), min(place + half + 1, len(present))):
                total += sum(
                    float(w) * f
                    for w, f in zip(weights[:, other - place + half], features[other], strict=True)
                )
            score[column] = total
        return score

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
