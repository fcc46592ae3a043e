"""Saliency: learned scores of a prompt's tokens decide what the cache keeps.

When the last layer has read a prompt, small heads score every token for every key/value head: by
what the prompt's newest queries gave it in all layers, by the norms of its values, and by its
neighbours; see `SaliencyHeads`. They are trained (`train_saliency`) to tell what the queries of an
answer would look at. One budget is shared out over all layers and heads: the best-scored slots of a
row stay, wherever they are. A row's first tokens and its newest stay in any case.

Without such heads the scores of SDTP's heads are used (arXiv 2504.04514v2 throws them away): the
tokens that came furthest through its stages stay, in all heads alike, and of those that came
equally far the ones that the last stage scored best (`Survival` in `kvprune.statistics`). The
policy then stands behind one that ranks hidden states: `ComposedCache([SDTP(), Saliency(0.25)])`.

Layers whose queries see a window (sliding or chunked attention) keep what is in it, and have no
part in the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.errors import KVPruneError
from kvprune.policy import OneBudget, Ranking, SlotView, best_of_layers
from kvprune.statistics import Queries, Statistic, Survival

from ..sdtp.shipped import fingerprint
from .features import PLACES, QUERIES, of_places, of_slots
from .heads import Layer, SaliencyHeads
from .shipped import heads_for, heads_in

SURVIVAL = "survival"
RECENT, RECENT_OF_SURVIVAL = 16, 64


@dataclass(frozen=True, repr=False)
class Saliency(OneBudget):
    """Keeps the slots that learned heads score best, of all layers and heads together.

    Args:
        budget: what a head keeps in all, sinks and newest slots included, as a mean over all
            layers and heads; tokens (int) or a share of the prompt (float).
        sinks: how many of a row's first tokens stay.
        recent: how many of the newest slots stay; None for 16 where heads score the others, which
            know what a question needs, and for 64 with "survival", so that questions are whole.
        heads: `SaliencyHeads`, or the folder that they are in; "survival" for the scores of the
            pruning of hidden states; None for the heads that ship with kvprune for the model, and
            "survival" where none do.
        layers: the layers that the policy works on, and that its heads see; None for all.
        when: see `TokenPolicy`; by default once, at the end of the first prompt, so that later
            turns and generated tokens stay.

    Raises:
        KVPruneError: a number out of range, a budget in tokens without room beside the sinks and
            the newest, no heads there; with a model, heads of another architecture, or
            "survival" in a pipeline without a policy that ranks hidden states.
    """

    sinks: int = 4
    recent: int | None = None
    heads: SaliencyHeads | str | PathLike[str] | None = None
    when: int | str | None = field(default="first", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sinks", "recent"):
            value = getattr(self, name)
            absent = name == "recent" and value is None
            if not absent and (type(value) is not int or value < 0):
                raise KVPruneError(f"Saliency: {name}={value!r}: expected tokens, at least 0")
        if not isinstance(self.heads, SaliencyHeads | str | PathLike | None):
            raise KVPruneError(
                f"Saliency: heads={self.heads!r}: expected SaliencyHeads, a folder, 'survival' or "
                f"None"
            )
        if isinstance(self.heads, PathLike):
            # A spec is made of a policy's repr.
            object.__setattr__(self, "heads", fspath(self.heads))
        if isinstance(self.budget, int) and self.budget <= self.protected:
            how = "with heads='survival'" if self.heads == SURVIVAL else "with heads"
            raise KVPruneError(
                f"Saliency: budget={self.budget}, of which the sinks={self.sinks} and (recent="
                f"{self.recent!r}, {how}) the newest {self._newest} stay in any case: expected a "
                f"budget above {self.protected}"
            )

    @property
    def protected(self) -> int:
        """The slots of each head that stay in any case, sinks and newest."""
        return self.sinks + self._newest

    @property
    def _newest(self) -> int:
        if self.recent is not None:
            return self.recent
        return RECENT_OF_SURVIVAL if self.heads == SURVIVAL else RECENT

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The newest queries, or how far tokens came; both while a model is not known."""
        if self._learned is not None:
            return (Queries(self._learned.queries),)
        return (Survival(),) if self.heads == SURVIVAL else (Queries(QUERIES), Survival())

    def for_model(self, model: nn.Module) -> Saliency:
        """The policy with its heads; refuses those of another architecture."""
        heads = self.heads
        if heads is None:
            heads = heads_for(model) or SURVIVAL
        elif heads != SURVIVAL and isinstance(heads, str | PathLike):
            heads = heads_in(heads, model)
        if isinstance(heads, SaliencyHeads):
            check_architecture(heads, model)
        return replace(self, heads=heads)

    def rank_layers(self, layers: Sequence[SlotView]) -> list[Ranking | None]:
        """Ranks all slots by what is learned, or layer by layer by how far tokens came."""
        shared = [view for view in layers if view.window is None]
        heads = self._learned
        if heads is None:
            rankings = [self._by_survival(view) for view in shared]
        elif shared:
            rankings = self._by_heads(heads, layers, shared)
        found = iter(rankings if shared else [])
        return [next(found) if view.window is None else None for view in layers]

    def _by_survival(self, view: SlotView) -> Ranking:
        score = view.statistic(Survival())[:, : view.columns.shape[1]]
        return Ranking(score, self._stays(view), view.tokens(self.budget))

    def _by_heads(
        self, heads: SaliencyHeads, layers: Sequence[SlotView], shared: Sequence[SlotView]
    ) -> list[Ranking]:
        scores = dict(zip((view.layer for view in layers), scores_of(heads, layers), strict=True))
        valid = [view.valid.expand(-1, view.heads, -1) for view in shared]
        amounts = [view.tokens(self.budget)[:, None] for view in shared]
        return best_of_layers(
            shared,
            [scores[view.layer] for view in shared],
            [self._stays(view).expand_as(there) for view, there in zip(shared, valid, strict=True)],
            [amount.minimum(there.sum(-1)) for amount, there in zip(amounts, valid, strict=True)],
        )

    def _stays(self, view: SlotView) -> Tensor:
        """`[B, 1|Hkv, S]`."""
        return view.oldest(self.sinks) | view.newest(self._newest)

    @property
    def _learned(self) -> SaliencyHeads | None:
        return self.heads if isinstance(self.heads, SaliencyHeads) else None

    def __repr__(self) -> str:
        """The policy as a call, with `...` in the place of heads, whose repr is long."""
        said = super().__repr__()
        return said if self._learned is None else said.replace(repr(self.heads), "...", 1)


@torch.no_grad()
def scores_of(heads: SaliencyHeads, layers: Sequence[SlotView]) -> list[Tensor]:
    """What heads say of the slots of layers, `[B, Hkv, S]` each, behind `Queries(heads.queries)`.

    Tokens meet by their number in the row: what one layer lacks, as hidden states were pruned
    before it, others may hold.
    """
    home, dtype = heads.place_mean.device, heads.place_mean.dtype
    count = max(view.seen for view in layers)
    rows = layers[0].columns.shape[0]
    places = torch.zeros(rows, PLACES, count + 1, device=home, dtype=dtype)
    there = torch.zeros(rows, count + 1, dtype=torch.bool, device=home)
    where = []
    for view in layers:
        tokens = view.positions.masked_fill(~view.valid, count).to(home)
        said, known = of_places(view, dtype).to(home), view.valid.to(home)
        for head in range(tokens.shape[1]):
            index = tokens[:, head]
            places.scatter_(2, index[:, None].expand(-1, PLACES, -1), said[:, :, head])
            there.scatter_(1, index, known[:, head])
        where.append(tokens)

    def each() -> Iterator[Layer]:
        for view, tokens in zip(layers, where, strict=True):
            yield view.layer, of_slots(view, heads.queries, heads.near, dtype).to(home), tokens

    found = heads(each(), places[..., :count], there[:, :count])
    return [score.to(view.columns.device) for score, view in zip(found, layers, strict=True)]


def check_architecture(heads: SaliencyHeads, model: Any) -> None:
    """Refuses heads of another architecture.

    Raises:
        KVPruneError: a model of another family, or of other sizes.
    """
    mine = heads.configuration["fingerprint"]
    here = fingerprint(model)["architecture"]
    if len(heads.shape) != here["num_hidden_layers"] or (mine and mine["architecture"] != here):
        raise KVPruneError(
            f"Saliency: the heads are for {mine['architecture'] if mine else len(heads.shape)} "
            f"(layers): expected those of {type(model).__name__}: {here}. Train heads for this "
            f"model: kvprune train-saliency"
        )
