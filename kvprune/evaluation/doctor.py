"""`kvprune doctor` says versions, devices, seams of transformers, and what a model may have.

It changes nothing, and loads nothing but the model.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import transformers

import kvprune
import kvprune.policies

from ..errors import KVPruneError
from ..models.releases import SEAMS, TESTED
from ..models.structure import base_of, unwrapped
from ..policies.saliency.shipped import heads_for as saliency_heads_for
from ..policies.sdtp.shipped import heads_for as sdtp_heads_for
from ..policy.base import TokenPolicy
from ..wiring.attach import attach
from .data.loading import loaded

EXTRAS = {
    "compare": ("matplotlib", "jinja2"),
    "train": ("accelerate", "scipy", "tqdm"),
    "cpu": ("numba",),
    "demo": ("gguf", "accelerate"),
    "lm-eval": ("lm_eval",),
    "examples": ("starlette", "uvicorn"),
    "ray": ("ray",),
    "flash": ("flash_attn",),
    "triton": ("triton",),
}
"""The extras of the package, and the modules that each of them brings."""

TRIED = 96
"""The tokens that each policy reads of a model."""


@dataclass(frozen=True)
class Line:
    """One line of the report: what it is about, what was found, and whether that is well."""

    name: str
    found: str
    well: bool = True


def examined(name: str | None = None, dtype: str = "auto") -> Iterator[Line]:
    """The lines of the report, as they are found.

    Args:
        name: of a model, or its folder; None for this installation alone.
        dtype: to load it in; see `loaded`.

    Raises:
        KVPruneError: there is no such model.
    """
    yield Line("kvprune", version("kvprune"))
    yield Line("Python", f"{platform.python_version()}, {platform.system()}, {platform.machine()}")
    yield Line("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield Line("transformers", f"{transformers.__version__} (tested: {', '.join(TESTED)})")
    yield Line("devices", ", ".join(_devices()))
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        yield Line(
            f"[{extra}]", "installed" if not missing else f"not installed ({', '.join(missing)})"
        )
    stock: Any = _stand_in() if name is None else loaded(name, dtype)[1]
    lacking = [(s.missing(stock), s.used) for s in SEAMS if s.needed(stock) and s.missing(stock)]
    yield Line("seams", f"{len(SEAMS) - len(lacking)} of {len(SEAMS)} found", not lacking)
    for what, used in lacking:
        yield Line("missing", f"{what}: kvprune needs it to {used}", False)
    if name is not None and not lacking:
        yield from _of_model(stock)


def _devices() -> Iterator[str]:
    yield "cpu"
    for index in range(torch.cuda.device_count()):
        yield f"cuda:{index} ({torch.cuda.get_device_name(index)})"
    if torch.backends.mps.is_available():
        yield "mps"


def _stand_in() -> Any:
    """A model without weights, on which this release's seams can be looked for."""
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        vocab_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def _of_model(stock: Any) -> Iterator[Line]:
    yield Line("model", f"{type(stock).__name__}, {str(stock.dtype).removeprefix('torch.')}")
    try:
        model = attach(stock)
        base: Any = base_of(unwrapped(model))
    except KVPruneError as error:
        yield Line("attach", f"refused: {error}", False)
        return
    yield Line("attach", "works")
    yield Line("heads of SDTP", "ship" if _has_sdtp(base) else "none ship: kvprune train-sdtp")
    saliency = "ship" if saliency_heads_for(base) else "none ship: kvprune train-saliency"
    yield Line("heads of Saliency", saliency)
    for name, store in (("plain", None), ("Quantized()", kvprune.Quantized())):
        yield Line(f"store {name}", _tried(model, [], store))
    left_out = list[str]()
    for policy in _policies(left_out):
        yield Line(repr(policy).partition("(")[0], _tried(model, [policy], None))
    yield Line("not tried", f"{', '.join(left_out)}: they need files or numbers")


def _has_sdtp(base: Any) -> bool:
    try:
        sdtp_heads_for(base)
    except KVPruneError:
        return False
    return True


def _policies(left_out: list[str]) -> Iterator[TokenPolicy]:
    """Each policy that needs nothing, with its defaults; those around another have SnapKV.

    The names of the others go to `left_out`.
    """
    for name in kvprune.policies.__all__:
        kind = getattr(kvprune.policies, name)
        if not issubclass(kind, TokenPolicy):
            continue
        needed = [
            parameter.name
            for parameter in inspect.signature(kind).parameters.values()
            if parameter.default is parameter.empty
        ]
        if needed == ["base"]:
            yield kind(kvprune.policies.SnapKV())
        elif not needed:
            yield kind()
        else:
            left_out.append(name)


def _tried(model: Any, policies: list[TokenPolicy], store: kvprune.Quantized | None) -> str:
    """Whether a cache reads some tokens with the model."""
    ids = torch.arange(TRIED)[None] % model.config.get_text_config(decoder=True).vocab_size
    try:
        kvprune.read(model, kvprune.ComposedCache(policies, store=store), ids.to(model.device))
    except KVPruneError as error:
        return f"refused: {error}"
    return "works"
