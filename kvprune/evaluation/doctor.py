"""What `kvprune doctor` says: versions, devices, seams of transformers, and what a model may have.

Nothing is changed, and nothing but the model is loaded.
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
    "bench": ("gguf",),
    "lm-eval": ("lm_eval",),
    "ray": ("ray",),
    "flash": ("flash_attn",),
    "triton": ("triton",),
}
"""The extras of the package, and the modules that each of them brings."""


@dataclass(frozen=True)
class Line:
    """One line of the report: what it is about, what was found, and whether that is well."""

    name: str
    found: str
    well: bool = True


def examined(model: str | None = None, dtype: str = "auto") -> Iterator[Line]:
    """The lines of the report, as they are found.

    Args:
        model: name or folder of a model; None for this installation alone.
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
        missing = [name for name in modules if find_spec(name) is None]
        yield Line(
            f"[{extra}]", "installed" if not missing else f"not installed ({', '.join(missing)})"
        )
    stock: Any = _stand_in() if model is None else loaded(model, dtype)[1]
    lacking = [(s.missing(stock), s.used) for s in SEAMS if s.needed(stock) and s.missing(stock)]
    yield Line("seams", f"{len(SEAMS) - len(lacking)} of {len(SEAMS)} found", not lacking)
    for name, used in lacking:
        yield Line("missing", f"{name}: kvprune needs it to {used}", False)
    if model is not None and not lacking:
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
        base: Any = base_of(unwrapped(attach(stock)))
    except KVPruneError as error:
        yield Line("attach", f"refused: {error}", False)
        return
    yield Line("attach", "works")
    yield Line("heads of SDTP", "ship" if _has_sdtp(base) else "none ship: kvprune train-sdtp")
    saliency = "ship" if saliency_heads_for(base) else "none ship: kvprune train-saliency"
    yield Line("heads of Saliency", saliency)
    for name, store in (("plain", None), ("Quantized()", kvprune.Quantized())):
        yield Line(f"store {name}", _tried(base, [], store))
    for policy in _policies():
        yield Line(repr(policy).partition("(")[0], _tried(base, [policy], None))


def _has_sdtp(base: Any) -> bool:
    try:
        sdtp_heads_for(base)
    except KVPruneError:
        return False
    return True


def _policies() -> Iterator[TokenPolicy]:
    """Each policy that needs no files, with its defaults; those around another have SnapKV."""
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


def _tried(base: Any, policies: list[TokenPolicy], store: kvprune.Quantized | None) -> str:
    """Whether a cache can be bound to the model."""
    try:
        kvprune.ComposedCache(policies, store=store).bind(base._kvprune, base)
    except KVPruneError as error:
        return f"refused: {error}"
    return "works"
