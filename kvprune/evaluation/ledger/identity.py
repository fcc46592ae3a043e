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
    """Digests of the files that define policies from outside kvprune; "" if there are none.

    A class that was typed in, as in a notebook, has no file: the digest is then one of its own
    code.
    """
    kinds = dict.fromkeys(kind for policy in policies for kind in type(policy).__mro__)
    sources = dict.fromkeys(_source(kind) for kind in kinds if _is_outside(kind))
    return " ".join(hashlib.sha256(source).hexdigest()[:16] for source in sources)


def _is_outside(kind: type) -> bool:
    return issubclass(kind, TokenPolicy) and kind.__module__.partition(".")[0] != "kvprune"


def _source(kind: type) -> bytes:
    """The file of a class; for a class that was typed in, its functions and values as text."""
    with suppress(TypeError, OSError):
        found = inspect.getsourcefile(kind)
        if found is not None and Path(found).is_file():
            return Path(found).read_bytes()
    own = {n: v for n, v in vars(kind).items() if callable(v) or not n.startswith("__")}
    return repr(sorted((name, _said(value)) for name, value in own.items())).encode()


def _said(value: Any) -> str:
    """The parts of a class's attribute that are the same in every run, as text."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    code = getattr(value, "__code__", value)
    if isinstance(code, CodeType):
        return repr((code.co_code, code.co_names, [_said(const) for const in code.co_consts]))
    # The order of a set differs from run to run.
    if isinstance(value, frozenset):
        return repr(sorted(map(repr, value)))
    return repr(value) if isinstance(value, (int, float, str, tuple, type(None))) else ""
