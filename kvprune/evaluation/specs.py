"""STAND-IN until the policies' spec language is merged: only what this branch's tests need."""

from __future__ import annotations

import ast

from kvprune.errors import KVPruneError
from kvprune.policies import H2O, SDTP, StreamingLLM
from kvprune.policy import TokenPolicy

_NAMES = {"h2o": H2O, "sdtp": SDTP, "streaming": StreamingLLM}


def parse(text: str) -> list[TokenPolicy]:
    """The policies of a spec."""
    tree = ast.parse(text, mode="eval").body
    return [] if text == "dense" else _pipeline(tree)


def _pipeline(node: ast.expr) -> list[TokenPolicy]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_pipeline(node.left), *_pipeline(node.right)]
    return [_policy(node)]


def _policy(node: ast.expr) -> TokenPolicy:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _policy(node.left) | _policy(node.right)
    name, keywords = (node.func, node.keywords) if isinstance(node, ast.Call) else (node, [])
    if not isinstance(name, ast.Name) or name.id not in _NAMES:
        raise KVPruneError(f"policies: expected one of {', '.join(_NAMES)}, came {ast.dump(node)}")
    given = {k.arg: ast.literal_eval(k.value) for k in keywords if k.arg}
    made: TokenPolicy = _NAMES[name.id](**given)
    return made


def canonical(policies: list[TokenPolicy]) -> str:
    """The spec with every argument named."""
    return " + ".join(map(repr, policies)) or "dense"
