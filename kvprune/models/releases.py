"""The names that transformers releases give to what kvprune uses, and a check that it is there.

kvprune reaches into transformers at a few places, the *seams*. This file is the only one that
knows how a seam is called in which release:

| what | its name |
| --- | --- |
| the cache, an argument of `generate` and of forwards | `cache`; until 5.23 `past_key_values` |
| the cache, in the decoder layers of BLOOM, Falcon, GPT-NeoX and others | `layer_past` |
| whether activations are checkpointed | `is_activation_checkpointing`; until 5.22 with `gradient` |
| what layers of a config attend to | a dict for each layer; until 5.18 one for all |
| layers that reuse the keys and values of others | "dummy"; until 5.22 left out at the end |

`attach` asks `check_release` and `check_model`, which name the first seam that is missing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from packaging import version
from torch import nn
from transformers import cache_utils, masking_utils, modeling_utils

from ..errors import KVPruneError

GenerationMode: Any = getattr(transformers.generation, "GenerationMode", None)
"""The ways in which `generate` decodes."""

TESTED = ("5.18.0", "5.24.0")
"""The releases that the core of the tests was run with, from the oldest that is supported on."""

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")
"""The names of the cache among arguments of modules, the newest first."""

# Names that a future release may drop. `check_release` reports them; importing never fails.
ALL_ATTENTION_FUNCTIONS: Any = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", None)
ALL_MASK_ATTENTION_FUNCTIONS: Any = getattr(masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS", None)
LinearAttentionLayer: Any = getattr(cache_utils, "LinearAttentionLayer", None)


# How a module is called.

# Not functools.cache: compiled code looks through it, with a warning.
_PARAMETERS: dict[Any, tuple[str, ...]] = {}


def parameters_of(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of the parameters of a class's forward, without self."""
    if kind not in _PARAMETERS:
        _PARAMETERS[kind] = tuple(inspect.signature(kind.forward).parameters)[1:]
    return _PARAMETERS[kind]


def cache_name(module: nn.Module) -> str:
    """The name of the cache in a module's forward; the newest name if it has none."""
    names = parameters_of(type(module))
    return next((name for name in CACHE_ARGUMENTS if name in names), CACHE_ARGUMENTS[0])


def with_cache(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword arguments that hand a cache, of any kind, to a module's forward."""
    return {cache_name(module): cache}


def generate_cache_name() -> str:
    """The name of the cache in this release's `generate`."""
    # `generate` itself takes it among its further keywords, so its signature does not say it.
    names = inspect.signature(transformers.GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_ARGUMENTS if name in names)


def renamed(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """The same keyword arguments, with the cache under the name that is asked for.

    Raises:
        KVPruneError: two caches were given.
    """
    given = [other for other in CACHE_ARGUMENTS if kwargs.get(other) is not None]
    if len(given) > 1:
        raise KVPruneError(
            f"{'= and '.join(given)}= were both given: expected one cache. Leave out one of the two"
        )
    if not given or given[0] == name:
        return kwargs
    rest = {key: value for key, value in kwargs.items() if key not in CACHE_ARGUMENTS}
    return {**rest, name: kwargs[given[0]]}


# What a release calls other things.


_CHECKPOINTING = ("is_activation_checkpointing", "is_gradient_checkpointing")
_CHECKPOINTING_OFF = ("activation_checkpointing_disable", "gradient_checkpointing_disable")


def checkpoints_activations(model: Any) -> bool:
    """Whether activation (gradient) checkpointing is switched on."""
    name = next(name for name in _CHECKPOINTING if hasattr(model, name))
    return bool(getattr(model, name))


def checkpointing_off(model: Any) -> str:
    """The name of the method that switches activation checkpointing off."""
    return next(name for name in _CHECKPOINTING_OFF if hasattr(model, name))


def chunks_begin_anew() -> bool:
    """Whether `generate` counts the chunks of a prompt from 0, whatever its cache has seen.

    Releases before 5.21 do so: masks and positions of a second turn in chunks are wrong there.
    """
    return version.parse(transformers.__version__) < version.parse("5.21")


def layer_types(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The kind of cache layer that transformers would make for each layer, and its options."""
    types, options = cache_utils.get_layer_types_and_kwargs(config)
    if isinstance(options, dict):
        # Until 5.18: one dict for all layers. Only layers that see less than everything use it.
        options = [_options_of(kind, options) for kind in types]
    # Until 5.22: layers that reuse the keys and values of others are left out at the end.
    reusing = getattr(config, "num_kv_shared_layers", None) or 0
    gone = reusing if len(types) + reusing == config.num_hidden_layers else 0
    return [*types, *["dummy"] * gone], [*options, *[{}] * gone]


def _options_of(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    wanted = {
        "sliding_attention": ("sliding_window",),
        "chunked_attention": ("sliding_window",),
        "linear_attention": ("number_of_states",),
    }
    return {name: options[name] for name in wanted.get(kind, ()) if name in options}


# Whether it is all there.


@dataclass(frozen=True)
class Seam:
    """One thing of transformers that kvprune builds on.

    used: what kvprune needs it for, as the end of "kvprune needs it to ...".
    name: of the attribute; more than one where releases differ, any of them will do.
    of: what has the attribute, given a model.
    takes: arguments that it must take, where it is a function; a tuple where any of them will do.
    needed: whether this model needs it.
    """

    used: str
    name: str | tuple[str, ...]
    of: Callable[[Any], Any]
    takes: tuple[str | tuple[str, ...], ...] = ()
    needed: Callable[[Any], bool] = lambda model: True

    def missing(self, model: Any) -> str:
        """The part of this seam that is missing on a model; empty where nothing is."""
        owner = self.of(model)
        where = getattr(owner, "__name__", type(owner).__name__)
        name = next((name for name in _any_of(self.name) if hasattr(owner, name)), None)
        if name is None:
            return f"{where}.{' or '.join(_any_of(self.name))}"
        if not self.takes:
            return ""
        found = inspect.signature(getattr(owner, name)).parameters
        for argument in self.takes:
            if not set(_any_of(argument)) & set(found):
                return f"the argument {' or '.join(_any_of(argument))} of {where}.{name}"
        return ""


def _any_of(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _modes(model: Any) -> Any:
    return GenerationMode


def _generates(model: Any) -> bool:
    return isinstance(model, transformers.GenerationMixin)


SEAMS = (
    Seam("run its attention function", "ALL_ATTENTION_FUNCTIONS", lambda model: modeling_utils),
    Seam("run its mask function", "ALL_MASK_ATTENTION_FUNCTIONS", lambda model: masking_utils),
    Seam(
        "read a model's mask rule",
        "sdpa_mask",
        lambda model: masking_utils,
        takes=(
            "kv_length",
            "kv_offset",
            "mask_function",
            "local_size",
            "allow_is_causal_skip",
        ),
    ),
    Seam(
        "know what each layer attends to",
        "get_layer_types_and_kwargs",
        lambda model: cache_utils,
    ),
    Seam("hold the states of linear layers", "LinearAttentionLayer", lambda model: cache_utils),
    Seam(
        "tell a cache how long masks are",
        "get_mask_sizes",
        lambda model: cache_utils.Cache,
        takes=("query_length", "layer_idx"),
    ),
    Seam("reorder beams", "reorder_cache", lambda model: cache_utils.Cache),
    Seam(
        "take drafts back",
        "crop",
        lambda model: cache_utils.Cache,
        takes=("tokens_to_remove",),
    ),
    Seam("learn that drafts follow", "activate_past_recording", lambda model: cache_utils.Cache),
    Seam("tell decoding modes apart", "GREEDY_SEARCH", _modes, needed=_generates),
    Seam("tell decoding modes apart", "SAMPLE", _modes, needed=_generates),
    Seam("tell decoding modes apart", "ASSISTED_GENERATION", _modes, needed=_generates),
    Seam("find the decoder layers", "base_model", type),
    Seam("set a model's attention function", "_can_set_attn_implementation", type),
    Seam("name its attention function", "_attn_implementation", lambda model: type(model.config)),
    Seam("find the decoder's config", "get_text_config", lambda model: type(model.config)),
    Seam("refuse activation checkpointing", _CHECKPOINTING, type),
    Seam("take part in generate", "generate", type, needed=_generates),
    Seam(
        "learn the prompt of a generate",
        "_prepare_cache_for_generation",
        type,
        takes=("generation_config", "model_kwargs", "generation_mode"),
        needed=_generates,
    ),
    Seam(
        "learn which rows of a generate have ended",
        "_get_stopping_criteria",
        type,
        takes=("generation_config",),
        needed=_generates,
    ),
    Seam(
        "hold rows still that had ended before",
        "_get_logits_processor",
        type,
        takes=("generation_config",),
        needed=_generates,
    ),
    Seam(
        "hand generate a cache",
        "prepare_inputs_for_generation",
        lambda model: transformers.GenerationMixin,
        takes=(CACHE_ARGUMENTS,),
        needed=_generates,
    ),
)
"""The seams that `check_release` looks at, on the model that `attach` is given."""

CALLED = Seam("find the cache of a forward", "forward", lambda kind: kind, takes=(CACHE_ARGUMENTS,))
"""The seams that `check_model` looks at, on the class of each module."""


def check_release(model: Any) -> None:
    """Refuses a transformers release without what kvprune builds on.

    Args:
        model: the one to attach to, unchanged so far.

    Raises:
        KVPruneError: a seam is missing; names it, the release, and the releases that were tested.
    """
    for seam in SEAMS:
        missing = seam.missing(model) if seam.needed(model) else ""
        if missing:
            raise _lacks(model, missing, seam.used)


def check_model(base: Any, layers: Sequence[nn.Module]) -> None:
    """Refuses a model whose modules are not handed a cache by a name that kvprune knows.

    Args:
        base: the model that has the decoder layers.
        layers: the decoder layers that have attention.

    Raises:
        KVPruneError: see `check_release`.
    """
    for kind in {type(module) for module in (base, *layers)}:
        missing = CALLED.missing(kind)
        if missing and not kind.__module__.startswith("transformers."):
            # No release would help: this is a model's own code.
            raise KVPruneError(
                f"attach: {kind.__name__}.forward takes none of {', '.join(CACHE_ARGUMENTS)}: "
                f"expected a model whose code calls its cache by one of these names. This model's "
                f"code is not supported"
            )
        if missing:
            raise _lacks(base, missing, CALLED.used)


def noted(generation_config: Any, name: str) -> Any:
    """A note of `generate` for itself, on the config of a generation.

    Args:
        generation_config: of a `generate` that is under way.
        name: "_mask_length" or "_pad_token_tensor".

    Raises:
        KVPruneError: this release notes nothing of that name.
    """
    if not hasattr(generation_config, name):
        raise _lacks(
            generation_config, f"GenerationConfig.{name}", "learn the prompt of a generate"
        )
    return getattr(generation_config, name)


def _lacks(model: Any, missing: str, used: str) -> KVPruneError:
    return KVPruneError(
        f"{missing} was not found for {type(model).__name__} in transformers "
        f"{transformers.__version__}: kvprune needs it to {used}. This is no fault of your code. "
        f"kvprune was tested with transformers {', '.join(TESTED)}: install one of these, as by "
        f"pip install 'transformers=={TESTED[-1]}', or a newer kvprune"
    )
