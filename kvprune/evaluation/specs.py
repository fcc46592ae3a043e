"""Policies as text: the specs that a command line takes and that a results file keeps.

    spec     = "dense" | pipeline | "[" pipeline with "," "]"
             | "ComposedCache(" such a list ["," "store=" store] ")"
    pipeline = union ("+" union)*
    union    = policy ("|" policy)*             binds tighter than "+"
    policy   = name ["(" arguments ")"]         arguments as in Python: plain values, unions
    store    = "quantized" ["(" arguments ")"]

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
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Any, NoReturn

from ..cache.composed import ComposedCache
from ..errors import KVPruneError
from ..policy.base import TokenPolicy
from ..policy.composition import Union, leaves
from ..storage.quantized import Quantized

GROUP = "kvprune.policies"
DENSE = "dense"
PLAIN = "plain"
"""Instead of a store: keys and values are held as the model made them."""
ALIASES = {"streaming": "streamingllm"}
# What Python's grammar has no place for, and quoted text, in which it stays as it is. In Python `|`
# binds less tightly than `+`, and here more tightly: it is read as `*`.
_APART = re.compile(
    r"""'(?:\\.|[^'\\])*' | "(?:\\.|[^"\\])*" | \| | (?<=[\w])\s*:\s*(?=[a-zA-Z_])""", re.VERBOSE
)
_COLON = "._in_."


def parse(text: str) -> list[TokenPolicy]:
    """The pipeline that a spec names; an empty list for "dense".

    Raises:
        KVPruneError: a text that is no spec, an unknown name or argument, a value that the policy
            refuses, or a spec with a store.
    """
    cache = cache_of(text)
    if cache.store is not None:
        raise KVPruneError(
            f"policy {text!r}: expected policies alone, got a store: {cache.store!r}. Leave it out"
        )
    return list(cache.policies)


def cache_of(text: str) -> ComposedCache:
    """An empty cache with the policies, and the store, that a spec names.

    Raises:
        KVPruneError: see `parse`; a store is allowed.
    """
    if not isinstance(text, str):
        raise KVPruneError(f"policy {text!r}: expected a spec as 'h2o(heavy=256)', got no text")
    policies, store = _Spec(text).read()
    return ComposedCache(policies, store=store)


def store_of(text: str) -> Quantized | None:
    """The store of a name, as "quantized(bits=4)"; None for "plain".

    Raises:
        KVPruneError: no such store, or arguments that it refuses.
    """
    if not isinstance(text, str):
        raise KVPruneError(f"store {text!r}: expected a text, as 'quantized(bits=4)' or 'plain'")
    if text.strip().lower() == PLAIN:
        return None
    try:
        return _Spec(f"ComposedCache([], store={text})").read()[1]
    except KVPruneError as error:
        reason = str(error).partition(": ")[2].partition(". A spec is")[0]
        raise KVPruneError(
            f"store {text!r}: expected plain, or quantized, as quantized(bits=4) ({reason})"
        ) from error


def canonical(policies: Sequence[TokenPolicy], store: Quantized | None = None) -> str:
    """The spec of a pipeline, in a store, with every argument named; it is read as equal ones.

    Raises:
        KVPruneError: a policy that no spec can express, such as SDTP with heads that are in no
            folder.
    """
    if store is not None:
        return f"ComposedCache([{', '.join(map(_written, policies))}], store={store!r})"
    return " + ".join(map(_written, policies)) or DENSE


def _written(policy: TokenPolicy) -> str:
    if isinstance(policy, Union):
        return " | ".join(map(_written, leaves([policy])))
    kind = type(policy)
    said = repr(_with_texts(_plain_layers(policy)))
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


class _Text(str):
    """A text that stands for itself in a repr."""

    __repr__ = str.__str__


def _with_texts(policy: TokenPolicy) -> TokenPolicy:
    """The policy with the specs of the policies within it in their place."""
    twin = copy.copy(policy)
    for name, value in vars(policy).items():
        if isinstance(value, TokenPolicy):
            object.__setattr__(twin, name, _Text(_written(value)))
    return twin


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


def _arguments(kind: type) -> list[str]:
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


class _Spec:
    """A text that is read as a Python expression, of which only the syntax tree is looked at."""

    def __init__(self, text: str) -> None:
        self._text = text

    def read(self) -> tuple[list[TokenPolicy], Quantized | None]:
        """The pipeline that the text names, and the store."""
        if self._text.strip().lower() == DENSE:
            return [], None
        match self._tree():
            case (
                ast.List(elts)
                | ast.Call(ast.Name("ComposedCache"), [ast.List(elts)], [])
                | ast.Call(
                    ast.Name("ComposedCache"),
                    [ast.List(elts)],
                    [ast.keyword("store", ast.Constant(None))],
                )
            ):
                return [self._union(node) for node in elts], None
            case ast.Call(
                ast.Name("ComposedCache"), [ast.List(elts)], [ast.keyword("store", store)]
            ):
                return [self._union(node) for node in elts], self._store(store)
            case ast.Call(ast.Name("ComposedCache")):
                return self._fail("expected ComposedCache([policies], store=quantized)")
            case node:
                return self._pipeline(node), None

    def _store(self, node: ast.expr) -> Quantized:
        called = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if self._name(called.func).lower() != Quantized.__name__.lower():
            self._fail(f"expected the store quantized, as quantized(bits=4), got {_spec_of(node)}")
        store: Quantized = self._called(Quantized, called)
        return store

    def _tree(self) -> ast.expr:
        line = _APART.sub(_as_python, re.sub(r"[\r\n]", " ", self._text).strip())
        if not line:
            self._fail("expected the name of a policy, got no text")
        try:
            return ast.parse(line, mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            self._fail(f"expected Python's syntax ({getattr(error, 'msg', error)})")

    def _fail(self, expected: str) -> NoReturn:
        raise KVPruneError(
            f"policy {self._text!r}: {expected}. A spec is dense, or policies as "
            f"h2o(heavy=256,recent=256), with a + b for a pipeline and a|b for what either keeps"
        )

    def _pipeline(self, node: ast.expr) -> list[TokenPolicy]:
        match node:
            case ast.BinOp(left, ast.Add(), right):
                return [*self._pipeline(left), *self._pipeline(right)]
        return [self._union(node)]

    def _union(self, node: ast.expr) -> TokenPolicy:
        match node:
            case ast.BinOp(left, ast.Mult(), right):
                both: TokenPolicy = self._made(Union.of, self._union(left), self._union(right))
                return both
        return self._policy(node)

    def _policy(self, node: ast.expr) -> TokenPolicy:
        called = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        policy: TokenPolicy = self._called(self._class(self._name(called.func)), called)
        return policy

    def _called(self, kind: type, called: ast.Call) -> Any:
        """What a class makes of the arguments of a call."""
        positional = [self._value(value) for value in called.args]
        if ... in positional:
            self._fail("expected arguments with their names where one is left out")
        allowed, named = _arguments(kind), dict[str, Any]()
        for argument in called.keywords:
            name, value = argument.arg or "**", self._value(argument.value)
            if name not in allowed:
                self._fail(f"{kind.__name__} has no argument {name!r}{_meant(name, allowed)}")
            if isinstance(value, TokenPolicy) and name in ("layers", "when"):
                self._fail(f"expected {name} to be a plain value, got the policy {value!r}")
            if name in named:
                self._fail(f"the argument {name!r} comes twice")
            named[name] = value
        # `...` stands for the default.
        named = {name: value for name, value in named.items() if value is not ...}
        return self._made(kind, *positional, **named)

    def _made(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return make(*args, **kwargs)
        # As in `_loaded`, code that is not ours may raise anything. The class of an unusual error
        # is named; the message of a ValueError or TypeError is enough by itself.
        except Exception as error:
            kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
            raise KVPruneError(f"policy {self._text!r}: {kind}{error}") from error

    def _name(self, node: ast.expr) -> str:
        """A name, `name` or `package.module:Class`."""
        name = ast.unparse(node).replace(_COLON, ":")
        if not re.fullmatch(r"\w+|[\w.]+:[\w.]+", name) or isinstance(node, ast.Constant):
            self._fail(f"expected the name of a policy, or module:Class, got {_spec_of(node)!r}")
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

    def _value(self, node: ast.expr) -> Any:
        """A plain value, or the policy that a policy is around."""
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            head = node
            while isinstance(head, ast.BinOp):
                head = head.left
            name = ast.unparse(head.func if isinstance(head, ast.Call) else head)
            if name.lower() in _known() or _COLON in name:
                return self._union(node)
            self._fail(
                f"expected a number, a text in quotes, None, a list or a policy, got "
                f"{_spec_of(node)!r}"
            )


def _as_python(found: re.Match[str]) -> str:
    """What Python's grammar reads in the place of what is a spec's own; quoted text stays."""
    if found[0] == "|":
        return "*"
    return _COLON if found[0].strip() == ":" else found[0]


def _spec_of(node: ast.expr) -> str:
    """The text of a node, as it stands in a spec."""
    return ast.unparse(node).replace(" * ", "|").replace(_COLON, ":")


def _meant(name: str, known: Iterable[str]) -> str:
    """The known names, and the one that a wrong name may stand for, as the end of a message."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f" (there are {', '.join(names)}){hint}"
