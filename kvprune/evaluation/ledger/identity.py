"""Digests of the code of policies, so that results of different code are not mixed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any

from ...policy.base import TokenPolicy


def code_digest(policies: Iterable[TokenPolicy]) -> str:
    """Of the files that policies from outside kvprune stand in; "" where there are none.

    Of classes that were typed in, as in a notebook, of their own code.
    """
    kinds = dict.fromkeys(kind for policy in policies for kind in type(policy).__mro__)
    sources = dict.fromkeys(_source(kind) for kind in kinds if _is_outside(kind))
    return " ".join(hashlib.sha256(source).hexdigest()[:16] for source in sources)


def _is_outside(kind: type) -> bool:
    return issubclass(kind, TokenPolicy) and kind.__module__.partition(".")[0] != "kvprune"


def _source(kind: type) -> bytes:
    """The file of a class; what its functions and numbers are where it was typed in."""
    with suppress(TypeError, OSError):
        found = inspect.getsourcefile(kind)
        if found is not None and Path(found).is_file():
            return Path(found).read_bytes()
    own = {n: v for n, v in vars(kind).items() if callable(v) or not n.startswith("__")}
    return repr(sorted((name, _said(value)) for name, value in own.items())).encode()


def _said(value: Any) -> str:
    """Of a class's attribute, what does not change from one run to the next."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    code = getattr(value, "__code__", value)
    if isinstance(code, CodeType):
        return repr((code.co_code, code.co_names, [_said(const) for const in code.co_consts]))
    if isinstance(value, frozenset):
        return repr(sorted(map(repr, value)))
    return repr(value) if isinstance(value, (int, float, str, tuple, type(None))) else ""
