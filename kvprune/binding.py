"""A cache and its model: what a cache has to know of it, and whether its policies work on it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .composition import leaves
from .errors import KVPruneError
from .masks import Local
from .policy import TokenPolicy
from .positions import Inside
from .releases import LinearAttentionLayer
from .slots import SlotLayer
from .statistics import check_statistics, wanted_at


@dataclass(frozen=True, eq=False)
class Attachment:
    """A model that kvprune is attached to, as its caches know it (by identity).

    local: by layer, what its queries can see; empty where all layers see everything.
    states: by layer, how many states it keeps instead of slots; empty where all have slots.
    cannot_prune: why its hidden states cannot be pruned; empty where they can.
    cannot_record: why drafts cannot be taken back; empty where they can.
    memory: what was found out about the model, so that it is not for every cache.
    group: the processes that share its heads; see `kvprune.parallel`.
    """

    name: str
    num_layers: int
    num_heads: int
    local: tuple[Local | None, ...] = ()
    states: tuple[int, ...] = ()
    cannot_prune: str = ""
    cannot_record: str = ""
    group: Any = None
    memory: dict[str, Any] = field(default_factory=dict)

    def says_the_same_as(self, other: Attachment) -> bool:
        """Whether two attachments describe the same model, whatever was found out about it."""
        facts = [f.name for f in fields(self) if f.name != "memory"]
        return all(getattr(self, name) == getattr(other, name) for name in facts)


def checked(policies: Sequence[TokenPolicy]) -> tuple[TokenPolicy, ...]:
    """A pipeline as it was handed in.

    Raises:
        KVPruneError: not a list of policies, or one that wants an unknown statistic.
    """
    is_list = isinstance(policies, (list, tuple))
    if not is_list or not all(isinstance(p, TokenPolicy) for p in policies):
        raise KVPruneError(
            f"ComposedCache: expected a list of policies, as ComposedCache([H2O()]), came "
            f"{policies!r}"
        )
    for policy in leaves(policies):
        check_statistics(policy)
    return tuple(policies)


def check_works(policies: Sequence[TokenPolicy], attachment: Attachment) -> None:
    """Refuses policies that cannot work on a model.

    Raises:
        KVPruneError: one is for layers that there are not, or prunes where that cannot be.
    """
    for policy in leaves(policies):
        _check_layers(policy, attachment)
        _check_prunes(policy, attachment)


def _check_prunes(policy: TokenPolicy, attachment: Attachment) -> None:
    if attachment.cannot_prune and "rank_hidden" in policy.hooks:
        raise KVPruneError(
            f"{policy!r} prunes hidden states, which {attachment.name} does not support: "
            f"{attachment.cannot_prune}. Use policies that evict slots"
        )


def _check_layers(policy: TokenPolicy, attachment: Attachment) -> None:
    wanted = policy.layers
    if wanted is None:
        return
    known, several = range(attachment.num_layers), isinstance(wanted, Collection)
    if not several or not all(type(i) is int and i in known for i in wanted):
        raise KVPruneError(
            f"{policy!r}: layers={wanted!r}: expected layers of 0 to {len(known) - 1} of "
            f"{attachment.name}"
        )


def new_layer(
    attachment: Attachment,
    index: int,
    policies: Sequence[TokenPolicy],
    observe: tuple[str, ...],
    inside: Inside | None,
) -> SlotLayer | LinearAttentionLayer:
    """An empty layer of a cache.

    Args:
        attachment: the model's.
        index: of the layer.
        policies: what they are on the model.
        observe: statistics that are wanted beside those of the policies.
        inside: how positions are assigned inside the cache; None where they are not.
    """
    if attachment.states and attachment.states[index]:
        return LinearAttentionLayer(number_of_states=attachment.states[index])
    local = attachment.local[index] if attachment.local else None
    names = tuple(dict.fromkeys(wanted_at(policies, index) + observe))
    return SlotLayer(names, local, inside is not None and inside.keeps_arrivals(index))
