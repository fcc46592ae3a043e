"""DuoAttention (arXiv 2410.10819): some heads keep everything, the others sinks and a window.

Few heads of a model retrieve from far away. The others, the streaming heads, need attention sinks
and the newest tokens alone; their other slots are freed as tokens come.

Where the sources differ:

* The paper learns a gate for each head on synthetic retrieval; its published files can be read
  (`HeadScores.load`). Heads are measured here without training, by how much attention they pay to
  what a streaming head would have dropped (`head_scores`).
* The paper's streaming heads attend to sinks and window in the prompt's forward, too; here, as in
  kvpress, a forward attends to all of its own tokens, and slots go after it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from kvprune.errors import KVPruneError
from kvprune.policy import Budget, Ranking, SlotView, TokenPolicy

from .scores import HeadScores, architecture

Heads = Mapping[int, Collection[int]] | Iterable[tuple[int, Collection[int]]]


@dataclass(frozen=True, repr=False)
class DuoAttention(TokenPolicy):
    """Streaming heads keep sinks and the newest slots, the other heads keep everything.

    Args:
        heads: the streaming heads: a file or folder of scores (see `HeadScores.load`), such scores,
            or the numbers of the key/value heads by layer, as {0: [1, 2], 1: []}.
        share: of all heads of the model, how many stream, those with the lowest scores; read with
            scores alone.
        sinks: how many of a row's first tokens a streaming head keeps.
        recent: how many of the newest slots it keeps; tokens (int) or a share of the prompt.
        layers: the layers that the policy works on; None for all.

    Raises:
        KVPruneError: a number out of range, heads that are neither, a file that cannot be read;
            with a model, scores of another or a layer that is not named.
    """

    heads: Heads | str | PathLike[str] | HeadScores
    share: float = 0.5
    sinks: int = 64
    recent: int | float = 256
    _measured: dict[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        Budget(self.recent, "DuoAttention: recent")
        if type(self.sinks) is not int or self.sinks < 0:
            raise KVPruneError(
                f"DuoAttention: sinks={self.sinks!r}: expected a number of tokens (an int of at "
                f"least 0)"
            )
        number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not number or not 0 <= self.share <= 1:
            raise KVPruneError(
                f"DuoAttention: share={self.share!r}: expected a number from 0.0 to 1.0"
            )
        heads = self.heads
        if isinstance(heads, (str, PathLike)):
            heads = HeadScores.load(heads)
        if isinstance(heads, HeadScores):
            object.__setattr__(self, "_measured", heads.model)
            heads = heads.streaming(self.share)
        object.__setattr__(self, "heads", _plain(heads))

    def for_model(self, model: torch.nn.Module) -> DuoAttention:
        """The policy itself; refuses a model that the heads are not of."""
        here = architecture(model)
        if self._measured is not None and self._measured != here:
            raise KVPruneError(
                f"DuoAttention: the heads were measured on {self._measured}: expected that model, "
                f"got {here}. Measure the heads of this one: kvprune measure-heads"
            )
        layers, count = here["num_hidden_layers"], here["num_key_value_heads"]
        streaming = dict(self._by_layer)
        missing = [n for n in range(layers) if self.applies(n) and n not in streaming]
        wrong = [
            n for n, heads in streaming.items() if n >= layers or max(heads, default=0) >= count
        ]
        if missing or wrong:
            raise KVPruneError(
                f"DuoAttention: heads: expected the streaming heads of each of {layers} layers, "
                f"numbers below {count}, and got none of the layers {missing} and others at "
                f"{wrong}. Name an empty list for a layer whose heads keep everything, or leave "
                f"layers out with layers="
            )
        return self

    def rank_slots(self, slots: SlotView) -> Ranking:
        """Protects what each head keeps."""
        mine = torch.zeros(slots.heads, dtype=torch.bool)
        own = range(slots.first_head, slots.first_head + slots.heads)
        for head in self._by_layer[slots.layer]:
            if head in own:
                mine[head - slots.first_head] = True
        streams = mine.to(slots.columns.device)[:, None]
        stays = slots.oldest(self.sinks) | slots.newest(self.recent)
        return Ranking.only(slots.valid & (stays | ~streams))

    @property
    def _by_layer(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = dict(self.heads)  # type: ignore[arg-type]
        return found


def _plain(heads: Any) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Layers in order, each with its streaming heads in order."""
    try:
        pairs = sorted((layer, tuple(sorted(set(each)))) for layer, each in dict(heads).items())
        numbers = [n for layer, each in pairs for n in (layer, *each)]
        if any(type(n) is not int or n < 0 for n in numbers):
            raise TypeError(f"{numbers}")
    except (TypeError, ValueError) as error:
        raise KVPruneError(
            f"DuoAttention: heads={heads!r}: expected a file of scores, or the numbers of the "
            f"streaming heads by layer, as {{0: [1, 2], 1: []}}"
        ) from error
    return tuple(pairs)
