"""Policies as text: the specs that a command line takes and that a results file keeps.

    spec     = "dense" | pipeline | "[" pipeline with "," "]" | "ComposedCache(" such a list ")"
    pipeline = union ("+" union)*
    union    = policy ("|" policy)*             binds tighter than "+"
    policy   = name ["(" arguments ")"]         arguments as in Python, each a plain value

So the text that `repr` prints of a policy or of a list of policies is a spec. The text that it
prints of a cache without content is one too, but for the ": empty" at its end. Nothing is
evaluated: `ast.literal_eval` reads each value, and `...` stands for the default.

A policy's name is the name of its class, in any case, or an alias; `module:Class` names any policy
that can be imported. A package adds names through the entry points of the group `kvprune.policies`:

    [project.entry-points."kvprune.policies"]
    mine = "my_package.my_policy:Mine"
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Any, NoReturn

from ..errors import KVPruneError
from ..policy.base import TokenPolicy
from ..policy.composition import Union, leaves

GROUP = "kvprune.policies"
DENSE = "dense"
ALIASES = {"streaming": "streamingllm"}


def parse(text: str) -> list[TokenPolicy]:
    """The pipeline that a spec names; an empty list for "dense".

    Raises:
        KVPruneError: a text that is no spec, an unknown name or argument, or a value that the
            policy refuses.
    """
    if not isinstance(text, str):
        raise KVPruneError(f"policy {text!r}: expected a spec as 'h2o(heavy=256)', got no text")
    return _Reader(text).spec()


def canonical(policies: Sequence[TokenPolicy]) -> str:
    """The spec of a pipeline with every argument named; `parse` makes equal policies of it.

    Raises:
        KVPruneError: a policy that no spec can express, such as SDTP with heads that are in no
            folder.
    """
    return " + ".join(map(_written, policies)) or DENSE


def _written(policy: TokenPolicy) -> str:
    if isinstance(policy, Union):
        return " | ".join(map(_written, leaves([policy])))
    kind = type(policy)
    said = repr(_plain_layers(policy))
    if not said.startswith(kind.__name__ + "(") or _hides_arguments(kind):
        raise KVPruneError(
            f"{said}: expected a policy whose repr is the call that makes it. Give "
            f"{kind.__name__} a __repr__, or make it a frozen dataclass (repr=False)"
        )
    text = _name_of(kind) + said.removeprefix(kind.__name__)
    if "=..." in text:
        raise KVPruneError(
            f"{said}: `...` stands for something that a spec cannot hold. Save it and name its "
            f"folder, as SDTP(heads='folder')"
        )
    # `parse` raises an error if the repr is not a spec after all.
    parse(text)
    return text


def _plain_layers(policy: TokenPolicy) -> TokenPolicy:
    """The policy with its layers as a sorted list, since they may be a range or a set."""
    layers = policy.layers
    if layers is None:
        return policy
    if not isinstance(layers, (Sequence, Set)) or any(type(layer) is not int for layer in layers):
        raise KVPruneError(
            f"{type(policy).__name__}: layers={layers!r}: expected numbers of layers, as [0, 2]"
        )
    twin = copy.copy(policy)
    object.__setattr__(twin, "layers", sorted(layers))
    return twin


def _hides_arguments(kind: type[TokenPolicy]) -> bool:
    """Whether the repr, which names only fields, leaves out arguments of the class's `__init__`."""
    fields = {f for k in kind.__mro__ for f in getattr(k, "__dataclass_fields__", {})}
    return kind.__repr__ is TokenPolicy.__repr__ and not set(_arguments(kind)) <= fields


def _name_of(kind: type[TokenPolicy]) -> str:
    known = _known()
    found = known.get(kind.__name__.lower())
    if found is not None and found() is kind:
        return kind.__name__
    return f"{kind.__module__}:{kind.__qualname__}"


def _arguments(kind: type[TokenPolicy]) -> list[str]:
    return list(inspect.signature(kind).parameters)


def _known() -> Mapping[str, Any]:
    """The loader of each policy class, by its name in lower case.

    Policies that ship with kvprune, and aliases, come before entry points of the same name.
    """
    import kvprune.policies

    found: dict[str, Any] = {}
    for point in entry_points(group=GROUP):
        found[point.name.lower()] = point.load
    for name in kvprune.policies.__all__:
        kind = getattr(kvprune.policies, name)
        if issubclass(kind, TokenPolicy):
            found[name.lower()] = lambda kind=kind: kind
    for alias, name in ALIASES.items():
        found[alias] = found[name]
    return found


@dataclass(frozen=True)
class _Token:
    kind: int
    text: str
    start: int
    end: int


class _Reader:
    """A recursive-descent parser over the tokens of Python's own tokenizer."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._split(text)
        self._at = 0

    def _split(self, text: str) -> list[_Token]:
        # The text is put on one line, so that a token's column is its place in the text.
        self._line = re.sub(r"[\r\n]", " ", text).strip()
        try:
            found = list(tokenize.generate_tokens(io.StringIO(self._line).readline))
        except (tokenize.TokenError, SyntaxError):
            self._fail("expected every bracket and quote to be closed")
        shown = [t for t in found if t.string.strip()]
        return [_Token(t.type, t.string, t.start[1], t.end[1]) for t in shown]

    def _fail(self, expected: str) -> NoReturn:
        raise KVPruneError(
            f"policy {self._text!r}: {expected}. A spec is dense, or policies as "
            f"h2o(heavy=256,recent=256), with a + b for a pipeline and a|b for what either keeps"
        )

    def _next(self, *texts: str) -> bool:
        """Reads the next token if it is one of these texts; returns whether it is."""
        found = self._at < len(self._tokens) and self._tokens[self._at].text in texts
        self._at += found
        return found

    def _expect(self, text: str) -> None:
        if not self._next(text):
            got = self._tokens[self._at].text if self._at < len(self._tokens) else "the end"
            self._fail(f"expected {text!r}, got {got!r}")

    def spec(self) -> list[TokenPolicy]:
        """Reads the whole text."""
        texts = [t.text for t in self._tokens]
        if [t.lower() for t in texts] in ([DENSE], ["[", "]"]):
            return []
        wrapped = texts[:2] == ["ComposedCache", "("]
        # Skips `ComposedCache` and its bracket.
        self._at = 2 * wrapped
        found = self._list() if self._next("[") else self._several("+")
        if wrapped:
            self._expect(")")
        if self._at < len(self._tokens):
            self._fail(f"expected no {self._tokens[self._at].text!r} here")
        return found

    def _list(self) -> list[TokenPolicy]:
        if self._next("]"):
            return []
        found = self._several(",")
        self._expect("]")
        return found

    def _several(self, between: str) -> list[TokenPolicy]:
        found = [self._union()]
        while self._next(between):
            found.append(self._union())
        return found

    def _union(self) -> TokenPolicy:
        policy = self._policy()
        while self._next("|"):
            policy = self._made(Union.of, policy, self._policy())
        return policy

    def _policy(self) -> TokenPolicy:
        kind = self._class(self._name())
        positional, named = self._call() if self._next("(") else ([], {})
        allowed = _arguments(kind)
        for name in named:
            if name not in allowed:
                self._fail(f"{kind.__name__} has no argument {name!r}{_meant(name, allowed)}")
        return self._made(kind, *positional, **named)

    def _made(self, make: Callable[..., TokenPolicy], *args: Any, **kwargs: Any) -> TokenPolicy:
        try:
            return make(*args, **kwargs)
        # As in `_loaded`, code that is not ours may raise anything. The class of an unusual error
        # is named; the message of a ValueError or TypeError is enough by itself.
        except Exception as error:
            kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
            raise KVPruneError(f"policy {self._text!r}: {kind}{error}") from error

    def _name(self) -> str:
        """Reads a name, `name` or `package.module:Class`."""
        begin = self._at
        # Names and separators take turns.
        while self._at < len(self._tokens) and (
            self._tokens[self._at].text in (".", ":")
            if (self._at - begin) % 2
            else self._tokens[self._at].kind == tokenize.NAME
        ):
            self._at += 1
        name = "".join(t.text for t in self._tokens[begin : self._at])
        if not re.fullmatch(r"\w+|[\w.]+:[\w.]+", name):
            got = name or (self._tokens[begin].text if begin < len(self._tokens) else "the end")
            self._fail(f"expected the name of a policy, or module:Class, got {got!r}")
        return name

    def _class(self, name: str) -> type[TokenPolicy]:
        known = _known()
        if ":" in name:
            kind = self._imported(name)
        elif name.lower() in known:
            kind = self._loaded(name, known[name.lower()])
        elif name.lower() == DENSE:
            self._fail("expected dense to stand alone")
        else:
            hint = _meant(name.lower(), [*known, DENSE])
            self._fail(f"there is no policy {name!r}{hint}")
        if not (isinstance(kind, type) and issubclass(kind, TokenPolicy)):
            self._fail(f"expected {name} to be a subclass of kvprune.TokenPolicy, got {kind!r}")
        return kind

    def _imported(self, name: str) -> Any:
        module, _, path = name.partition(":")
        return self._loaded(name, lambda: attrgetter(path)(importlib.import_module(module)))

    def _loaded(self, name: str, load: Callable[[], Any]) -> Any:
        """The class that `load` returns.

        Raises:
            KVPruneError: `load` raises an error.
        """
        try:
            return load()
        # A module that is not ours may raise any error when it is imported.
        except Exception as error:
            self._fail(f"expected {name} to be a class that can be imported ({error})")

    def _call(self) -> tuple[list[Any], dict[str, Any]]:
        """Reads the arguments up to the closing bracket; an argument that is `...` is left out."""
        positional: list[Any] = []
        named: dict[str, Any] = {}
        seen = set[str]()
        while not self._next(")"):
            name = self._argument_name()
            value = self._value()
            if name in seen:
                self._fail(f"the argument {name!r} comes twice")
            # An argument without a name must come first, and has no default to fall back on.
            if name is None and (seen or value is ...):
                self._fail("expected arguments with their names")
            if name is None:
                positional.append(value)
            else:
                seen.add(name)
                named |= {} if value is ... else {name: value}
            if not self._next(","):
                self._expect(")")
                break
        return positional, named

    def _argument_name(self) -> str | None:
        """Reads `name=` and returns the name; None if something else comes next."""
        pair = self._tokens[self._at : self._at + 2]
        if len(pair) < 2 or pair[0].kind != tokenize.NAME or pair[1].text != "=":
            return None
        self._at += 2
        return pair[0].text

    def _value(self) -> Any:
        """Reads a plain value, up to the comma or the bracket that ends it."""
        begin, depth = self._at, 0
        while self._at < len(self._tokens):
            text = self._tokens[self._at].text
            if depth == 0 and text in (",", ")"):
                break
            depth += (text in "([{") - (text in ")]}")
            self._at += 1
        tokens = self._tokens[begin : self._at]
        said = self._line[tokens[0].start : tokens[-1].end] if tokens else ""
        try:
            return ast.literal_eval(said)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            self._fail(f"expected a number, a text in quotes, None or a list, got {said!r}")


def _meant(name: str, known: Iterable[str]) -> str:
    """The known names, and the one that a wrong name may stand for, as the end of a message."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f" (there are {', '.join(names)}){hint}"
