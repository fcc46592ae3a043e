"""Checks of policies that are handed to a cache: hooks, promises and statistics."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from ..errors import KVPruneError
from ..statistics import check_statistics
from .base import HOOKS, TokenPolicy
from .composition import leaves
from .moment import check_when


def checked(policies: Sequence[TokenPolicy]) -> tuple[TokenPolicy, ...]:
    """A pipeline as it was handed in.

    Raises:
        KVPruneError: not a list of policies, or one that wants what cannot be observed, is asked at
            no time that there is, has no hook, or has something that reads like a hook or a promise
            but is misspelt.
    """
    is_list = isinstance(policies, (list, tuple))
    if not is_list or not all(isinstance(p, TokenPolicy) for p in policies):
        raise KVPruneError(
            f"ComposedCache: expected a list of policies, as ComposedCache([H2O()]), got "
            f"{_short(policies)}"
        )
    for policy in leaves(policies):
        _check_hooks(policy)
        check_statistics(policy.statistics, f"{policy!r}: statistics")
        _check_fields(policy)
    return tuple(policies)


_ANY_HOOK = f"{', '.join(HOOKS[:-1])} or {HOOKS[-1]}"

_CLOSE = 0.85
"""The ratio of `difflib` from which on a name is taken for another one that is misspelt."""


_FIELDS = (
    ("when", "int | str | None", "'prompt'"),
    ("layers", "Collection[int] | None", "(1, 2)"),
)
"""Options that every policy has: their types, and an example of a default."""

_ANSWERS: dict[str, tuple[type, ...]] = {
    "statistics": (tuple, list, str),
    "shares_heads": (bool,),
    "positions_in_cache": (bool,),
    "sinks_before_window": (int,),
    "constant_budget": (bool,),
    "layers_alike": (bool,),
}
"""The class attributes with which a policy speaks of itself, and their types."""


def _check_hooks(policy: TokenPolicy) -> None:
    """Refuses a policy that nobody would ever ask, or not for all that its author meant.

    Raises:
        KVPruneError: no hook, or a name that is nearly that of a hook or of a class attribute.
    """
    own = dict(_own_attributes(policy))
    # What a base like `Around` adds is a hook of its policies.
    more = ("rerank",) if hasattr(type(policy), "rerank") else ()
    for name, value in own.items():
        meant = "" if name in more else _meant_by(name, value, (*HOOKS, *more))
        if meant:
            raise KVPruneError(
                f"{policy!r}: nothing asks for {type(policy).__name__}.{name}: expected {meant}, "
                f"defined in the class. Rename it; a helper of the policy's own begins with an "
                f"underscore"
            )
    if {"rank_slots", "rank_layers"} <= policy.hooks:
        raise KVPruneError(
            f"{policy!r} ranks slots twice: expected a policy with rank_slots, which is asked "
            f"about one layer, or with rank_layers, which is asked about all at once, not both"
        )
    # A class with `hooks` of its own may well say that there is nothing to do.
    if not policy.hooks and type(policy).hooks is TokenPolicy.hooks:
        defined = ", ".join(name for name in own if callable(own[name])) or "no method"
        raise KVPruneError(
            f"{policy!r} would keep everything: expected a policy whose class defines "
            f"{_ANY_HOOK}, got one that defines {defined}. Override a hook; ComposedCache([]) is "
            f"dense"
        )


def _own_attributes(policy: TokenPolicy) -> Iterator[tuple[str, Any]]:
    """A policy's attributes beyond `TokenPolicy`, by name; no options, no special names."""
    kinds = [kind for kind in type(policy).__mro__ if not issubclass(TokenPolicy, kind)]
    options = {option.name for option in fields(policy)}
    for namespace in (*map(vars, reversed(kinds)), vars(policy)):
        for name, value in namespace.items():
            inherited = hasattr(TokenPolicy, name)
            # A hook that the object alone has, `self.rank_slots = ...`, is never asked either.
            lost = name in HOOKS and name not in policy.hooks and namespace is vars(policy)
            if lost or not (inherited or name.startswith("__") or name in options):
                yield name, value


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) < 200 else f"{said[:200]}... ({type(value).__name__})"


def _meant_by(name: str, value: Any, hooks: Sequence[str]) -> str:
    """The name that was meant; empty where it is a name of the policy's own."""
    if name.startswith("_"):
        return ""
    if callable(value) or isinstance(value, (classmethod, staticmethod)):
        close = difflib.get_close_matches(name, hooks, n=1, cutoff=_CLOSE)
        # `rank_layer` resembles no hook more than another, and is none.
        all_hooks = [_ANY_HOOK] if name.startswith("rank_") else []
        return "".join((close or all_hooks)[:1])
    close = difflib.get_close_matches(name, _ANSWERS, n=1, cutoff=_CLOSE)
    # A value of another type could not be what is meant.
    if close and isinstance(value, (*_ANSWERS[close[0]], property)):
        return close[0]
    return ""


def _check_fields(policy: TokenPolicy) -> None:
    check_when(policy.when, repr(policy))
    for kind in type(policy).__mro__:
        if kind is TokenPolicy:
            return
        # A dataclass goes by annotated fields alone, so this would be lost without a word.
        for name, kinds, example in _FIELDS:
            if name in vars(kind) and name not in inspect.get_annotations(kind):
                raise KVPruneError(
                    f"{policy!r}: {kind.__name__} says {name} = {vars(kind)[name]!r} without a "
                    f"type, which changes nothing: expected a field of a dataclass, as `{name}: "
                    f"{kinds} = field(default={example}, kw_only=True)`"
                )
