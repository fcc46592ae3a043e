"""The oracle of a real family: the dense model, in which what is gone is masked out.

An unattached eager model of the same weights reads the whole sequence anew for every forward,
with no cache. In each layer a 4-D mask hides from each query exactly what had been dropped
before that query's forward; who is dropped is decided here, by the naive policies of
`oracles.py`, from the probabilities of this very model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvprune.models.families import attention_of
from kvprune.models.structure import argument, base_of, decoder_layers, with_argument
from kvprune.policies import SDTP

from .masked_dense import MaskedDense
from .models import positions
from .oracles import h2o_keep, streaming_keep

Keeper = Callable[[list[int], dict[int, float], int], list[int]]
"""From the columns present, their scores and the row's first column to those kept."""


def h2o_keeper(heavy: int, recent: int) -> Keeper:
    """H2O, by token counts."""
    return lambda present, scores, first: h2o_keep(present, scores, heavy, recent)


def streaming_keeper(sinks: int, window: int) -> Keeper:
    """StreamingLLM."""
    return lambda present, scores, first: streaming_keep(present, sinks, window, first)


@dataclass
class Local:
    """What a layer can still see: the last `size` columns, or the chunk of that size."""

    size: int
    chunked: bool = False

    def oldest(self, query: int, first: int) -> int:
        """The oldest column that a query may attend to."""
        if self.chunked:
            return query - (query - first) % self.size
        return query - self.size + 1


class FamilyOracle(MaskedDense):
    """One batch of sequences on one model, pruned, evicted, both or neither.

    `slots[layer][row][head]` maps the columns present to their scores; `visible[layer]`
    `[B, H, N, N]` says which columns were there for each query's forward. `heads[layer]` is H;
    query head i reads head `i % H` where they are `tiled`, and else its neighbours read the same.
    """

    def __init__(
        self,
        model: Any,
        heads: Sequence[int],
        pruner: SDTP | None = None,
        keeper: Keeper | None = None,
        local: Sequence[Local | None] | None = None,
        linear: Sequence[int] = (),
        tiled: bool = False,
    ) -> None:
        super().__init__(model, pruner)  # type: ignore[arg-type]
        self.linear = linear
        self.heads, self.keeper, self.tiled = heads, keeper, tiled
        self.layers = len(heads)
        self.local = local or [None] * self.layers
        self.slots: list[list[list[dict[int, float]]]] = []
        self.visible: list[Tensor] = []
        self.count, self.asked = 0, 1
        self._query_heads: list[int] = []

    @property
    def takes_positions(self) -> bool:
        """Whether the model is handed positions; BLOOM derives them from the mask."""
        return "position_ids" in inspect.signature(self.model.forward).parameters

    def forward(self, ids: Tensor, mask: Tensor, asked: int = 1) -> Tensor:
        """Reads new tokens; `asked` of them, at the end, are protected. Logits `[B, Q, V]`."""
        self._extend(ids, mask)
        self.count, self.asked = ids.shape[1], asked
        options = {"position_ids": positions(self.mask)} if self.takes_positions else {}
        handles = self._hooks()
        try:
            with torch.no_grad():
                output = self.model(
                    self.ids, attention_mask=self.mask, use_cache=False, **options
                )  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()
        return output.logits[:, -self.count :]

    def _extend(self, ids: Tensor, mask: Tensor) -> None:
        rows, count = ids.shape
        if not self.alive:
            self.ids, self.mask = ids[:, :0], mask[:, :0]
            self.alive = [torch.zeros(rows, 0, dtype=torch.bool)] * self.layers
            self.visible = [torch.zeros(rows, h, 0, 0, dtype=torch.bool) for h in self.heads]
            self.slots = [[[{} for _ in range(h)] for _ in range(rows)] for h in self.heads]
        before = self.ids.shape[1]
        self.ids, self.mask = torch.cat([self.ids, ids], 1), torch.cat([self.mask, mask], 1)
        self.alive = [torch.cat([a, mask.bool()], 1) for a in self.alive]
        for layer, old in enumerate(self.visible):
            heads = self.heads[layer]
            new = torch.zeros(rows, heads, before + count, before + count, dtype=torch.bool)
            new[:, :, :before, :before] = old
            new[:, :, before:, before:] = True
            for row in range(rows):
                for head in range(heads):
                    for column in self.slots[layer][row][head]:
                        new[row, head, before:, column] = True
            self.visible[layer] = new

    def _hooks(self) -> list[Any]:
        base, handles = base_of(self.model), []
        for index, layer in enumerate(decoder_layers(base)):
            before, masked, after = self._bound(index)
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            if index in self.linear:
                continue
            attention = attention_of(base, layer)
            handles += [
                attention.register_forward_pre_hook(masked, with_kwargs=True),
                attention.register_forward_hook(after),
            ]
        return handles

    def _bound(self, index: int) -> tuple[Any, Any, Any]:
        def before(module: Any, args: Any, kwargs: Any) -> Any:
            return self._before(index, args, kwargs)

        def masked(module: Any, args: Any, kwargs: Any) -> Any:
            own = argument(module, args, kwargs, "attention_mask")
            mask = self._masked(index, own)
            args, kwargs = with_argument(module, args, kwargs, "attention_mask", mask)
            if self.model.config.model_type == "falcon" and kwargs["alibi"] is not None:
                # Falcon's mask holds ALiBi already: its eager code adds it twice, unlike sdpa's.
                kwargs["alibi"] = torch.zeros_like(kwargs["alibi"])
            return args, kwargs

        def after(module: Any, args: Any, output: Any) -> None:
            self._evict(index, output[1])

        return before, masked, after

    def _before(self, layer: int, args: Any, kwargs: Any) -> Any:
        if self.policy is not None:
            self.decide(layer, args[0], self.count, self.asked)

    def _masked(self, layer: int, own: Tensor) -> Tensor:
        """The model's own additive mask, and what is gone hidden, `[B, Hq, N, N]`."""
        visible = self.visible[layer] & self.alive[layer][:, None, None, :]
        hidden = ~visible[:, [self._read_by(layer, head) for head in range(self._queries(layer))]]
        # Far from float64's end: a query that sees nothing (padding) must not become NaN,
        # of which a weight of 0 in a later layer makes NaN for everybody.
        return own.clamp(min=-1e9).masked_fill(hidden, -1e9)

    def _queries(self, layer: int) -> int:
        """How many query heads a layer has."""
        if not self._query_heads:
            config = self.model.config.get_text_config(decoder=True)
            # The usual name is the encoder's, where there was one.
            own = hasattr(config, "decoder_attention_heads")
            name = "decoder_attention_heads" if own else "num_attention_heads"
            self._query_heads = [int(getattr(c, name)) for c in config.per_layer_config]
        return self._query_heads[layer]

    def _read_by(self, layer: int, query_head: int) -> int:
        """Which key/value head a query head reads."""
        heads = self.heads[layer]
        return query_head % heads if self.tiled else query_head * heads // self._queries(layer)

    def _evict(self, layer: int, probabilities: Tensor) -> None:
        """Adds what the new tokens' queries gave `[B, Hq, N, N]`, and drops."""
        size = self.ids.shape[1]
        queries = range(size - self.count, size)
        for row, heads in enumerate(self.slots[layer]):
            first = int(self.mask[row].nonzero()[0, 0]) if bool(self.mask[row].any()) else size
            new = [q for q in queries if self.alive[layer][row, q]]
            for head, slots in enumerate(heads):
                slots.update(dict.fromkeys(new, 0.0))
                queries_of = range(probabilities.shape[1])
                mine = [q for q in queries_of if self._read_by(layer, q) == head]
                given = probabilities[row, mine].sum(0).tolist()
                for column in slots:
                    slots[column] += sum(given[q][column] for q in new)
                self._drop(layer, slots, size, first)

    def _drop(self, layer: int, slots: dict[int, float], size: int, first: int) -> None:
        local = self.local[layer]
        oldest = 0 if local is None else local.oldest(size, first)
        present = sorted(c for c in slots if c >= oldest)
        if self.keeper is not None:
            present = self.keeper(present, slots, first)
        for column in set(slots) - set(present):
            del slots[column]

    def kept(self, layer: int, row: int, head: int) -> list[int]:
        """The columns that a layer holds for a row and key/value head."""
        return sorted(self.slots[layer][row][head])


class ShortenedRow(FamilyOracle):
    """One row without padding, in which pruned tokens are taken out instead of masked.

    So that layers that keep a state are never shown them: each layer is handed the hidden
    states, positions and mask of the survivors alone, as if the sequence had been that short.
    """

    inside: Tensor

    def _before(self, layer: int, args: Any, kwargs: Any) -> Any:
        hidden, size = args[0], self.ids.shape[1]
        if layer == 0:
            self.inside = torch.arange(size)
        whole = hidden.new_zeros(1, size, hidden.shape[2]).index_copy(1, self.inside, hidden)
        super()._before(layer, (whole,), kwargs)
        self.inside = self.alive[layer][0].nonzero().flatten()
        kwargs = dict(kwargs)
        angles = kwargs["position_embeddings"]
        if angles is not None:
            angles = tuple(p.index_select(1, self.inside) for p in angles)
            kwargs["position_embeddings"] = angles
        # Layers of either kind: there is no padding, and attention is masked in `_masked`.
        kwargs["attention_mask"] = None
        return (whole.index_select(1, self.inside), *args[1:]), kwargs

    def _masked(self, layer: int, own: Any) -> Tensor:
        size = self.ids.shape[1]
        causal = torch.zeros(1, 1, size, size, dtype=torch.float64)
        causal.masked_fill_(~torch.ones(size, size, dtype=torch.bool).tril(), -1e9)
        whole = super()._masked(layer, causal)
        return whole.index_select(2, self.inside).index_select(3, self.inside)

    def _evict(self, layer: int, probabilities: Tensor) -> None:
        size = self.ids.shape[1]
        shape = (*probabilities.shape[:2], size, size)
        whole = probabilities.new_zeros(shape)
        whole[:, :, self.inside[:, None], self.inside] = probabilities
        super()._evict(layer, whole)


class RowByRow:
    """A `ShortenedRow` for each row of a left-padded batch, with a `FamilyOracle`'s methods."""

    takes_positions = True

    def __init__(self, *arguments: Any, rows: int = 2) -> None:
        self.rows = [ShortenedRow(*arguments) for _ in range(rows)]
        self.heads = self.rows[0].heads
        self.mask = torch.ones(rows, 0, dtype=torch.long)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of the last token, `[B, 1, V]`."""
        self.mask = torch.cat([self.mask, mask], 1)
        logits = []
        for row, oracle in enumerate(self.rows):
            mine = ids[row : row + 1, int((mask[row] == 0).sum()) :]
            logits.append(oracle.forward(mine, torch.ones_like(mine))[:, -1:])
        return torch.cat(logits)

    def kept(self, layer: int, row: int, head: int) -> list[int]:
        """The columns that a layer holds for a row and key/value head."""
        padding = int((self.mask[row] == 0).sum())
        return [c + padding for c in self.rows[row].kept(layer, 0, head)]
