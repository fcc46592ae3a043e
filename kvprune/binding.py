"""A cache and its model: what a cache has to know of it, and whether its policies work on it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .composition import leaves
from .errors import KVPruneError
from .masks import Local
from .policy import HOOKS, TokenPolicy
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
        KVPruneError: not a list of policies, or one that wants an unknown statistic, has no hook,
            or has something that reads like a hook or a promise but is misspelt.
    """
    is_list = isinstance(policies, (list, tuple))
    if not is_list or not all(isinstance(p, TokenPolicy) for p in policies):
        raise KVPruneError(
            f"ComposedCache: expected a list of policies, as ComposedCache([H2O()]), came "
            f"{policies!r}"
        )
    for policy in leaves(policies):
        _check_hooks(policy)
        check_statistics(policy)
    return tuple(policies)


_CLOSE = 0.85
"""From this ratio of `difflib` on, a name is taken for another one that is misspelt."""

_ANSWERS: dict[str, tuple[type, ...]] = {
    "statistics": (tuple, list, str),
    "shares_heads": (bool,),
    "positions_in_cache": (bool,),
    "sinks_before_window": (int,),
    "constant_budget": (bool,),
    "layers_alike": (bool,),
}
"""What a policy says of itself as class attributes, and of which types; properties may, too."""


def _check_hooks(policy: TokenPolicy) -> None:
    """Refuses a policy that nobody would ever ask, or not for all that its author meant.

    Raises:
        KVPruneError: no hook, or a name that is nearly that of a hook or of a class attribute.
    """
    own = dict(_own_attributes(policy))
    for name, value in own.items():
        meant = _meant_by(name, value)
        if meant:
            raise KVPruneError(
                f"{policy!r}: nothing asks for {type(policy).__name__}.{name}: expected {meant}, "
                f"defined in the class. Rename it; a helper of the policy's own begins with an "
                f"underscore"
            )
    # A class with `hooks` of its own may well say that there is nothing to do.
    if not policy.hooks and type(policy).hooks is TokenPolicy.hooks:
        defined = ", ".join(name for name in own if callable(own[name])) or "no method"
        raise KVPruneError(
            f"{policy!r} would keep everything: expected a policy whose class defines "
            f"{' or '.join(HOOKS)}, got one that defines {defined}. Override a hook; "
            f"ComposedCache([]) is dense"
        )


def _own_attributes(policy: TokenPolicy) -> Iterator[tuple[str, Any]]:
    """What a policy has beyond `TokenPolicy`, by name; its options and special names left out."""
    kinds = [kind for kind in type(policy).__mro__ if not issubclass(TokenPolicy, kind)]
    options = {option.name for option in fields(policy)}
    for namespace in (*map(vars, reversed(kinds)), vars(policy)):
        for name, value in namespace.items():
            inherited = hasattr(TokenPolicy, name)
            # A hook that the object alone has, `self.rank_slots = ...`, is never asked either.
            lost = name in HOOKS and name not in policy.hooks and namespace is vars(policy)
            if lost or not (inherited or name.startswith("__") or name in options):
                yield name, value


def _meant_by(name: str, value: Any) -> str:
    """What a name was meant to be; empty where it is a name of the policy's own."""
    if name.startswith("_"):
        return ""
    if callable(value) or isinstance(value, (classmethod, staticmethod)):
        close = difflib.get_close_matches(name, HOOKS, n=1, cutoff=_CLOSE)
        # `rank_layer` resembles no hook more than another, and is none.
        all_hooks = [" or ".join(HOOKS)] if name.startswith("rank_") else []
        return "".join((close or all_hooks)[:1])
    close = difflib.get_close_matches(name, _ANSWERS, n=1, cutoff=_CLOSE)
    # A value of another type could not be what is meant.
    if close and isinstance(value, (*_ANSWERS[close[0]], property)):
        return close[0]
    return ""


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
