"""Every name that the cache has, and what happens where a release lacks what kvprune uses."""

from __future__ import annotations

import functools
import inspect
import logging
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import kvprune
from kvprune import ComposedCache, KVPruneError
from kvprune.models import releases
from kvprune.models.releases import CALLED, SEAMS, TESTED, Seam, generate_cache_name
from kvprune.policies import H2O

from ..support.models import fresh_model, prompt, tiny_model
from ..support.strategies import sdtp_pruner

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("cache", "past_key_values")


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def no_deprecation(caplog):
    """Nothing that runs may warn of what is deprecated, by warnings or by transformers' logger."""
    transformers.utils.logging.enable_propagation()
    for once in ("warning_once", "info_once"):
        getattr(logging.Logger, once).cache_clear()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        yield
    transformers.utils.logging.disable_propagation()
    assert not [r.getMessage() for r in caplog.records if "deprecated" in r.getMessage()]


# The names of the cache.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", ["model", "model.forward", "base", "base.forward"])
def test_a_forward_takes_the_cache_by_both_names(no_deprecation, name, call):
    """A pipeline of both kinds gives what it gives by the release's own name."""
    model: Any = tiny_model()
    run = {
        "model": model,
        "model.forward": model.forward,
        "base": model.model,
        "base.forward": model.model.forward,
    }[call]
    policies = [sdtp_pruner(0.6), H2O(4, 4)]
    ids, caches = prompt(2, 16), (ComposedCache(policies), ComposedCache(policies))
    own = "cache" if "cache" in inspect.signature(type(model).forward).parameters else NAMES[1]
    expected = (model if call.startswith("model") else model.model)(ids, **{own: caches[0]})[0]
    assert torch.equal(run(ids, **{name: caches[1]})[0], expected)
    assert caches[0].columns(2).tolist() == caches[1].columns(2).tolist()
    assert caches[1].columns(2).shape[-1] == 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [ComposedCache, lambda: ComposedCache([H2O(4, 4)]), DynamicCache])
def test_generate_takes_the_cache_by_both_names(no_deprecation, name, make):
    """A cache of ours, and one of transformers."""
    model, cache = tiny_model(), make()
    tokens = model.generate(prompt(2, 12), max_new_tokens=6, **{name: cache})
    assert cache.get_seq_length() == 17
    expected = model.generate(prompt(2, 12), max_new_tokens=6, **{generate_cache_name(): make()})
    assert torch.equal(tokens, expected)


def test_generate_takes_a_maker_by_both_names():
    """A callable is asked for a cache each time."""
    model, made = tiny_model(), []

    def make():
        made.append(ComposedCache([H2O(4, 4)]))
        return made[-1]

    for name in NAMES:
        model.generate(prompt(1, 12), max_new_tokens=2, **{name: make})
    assert [cache.seen for cache in made] == [13, 13]


@pytest.mark.parametrize("other", [ComposedCache, DynamicCache])
def test_two_caches_are_refused(other):
    """By generate and by both forwards; neither cache is changed."""
    model: Any = tiny_model()
    ids, cache = prompt(1, 9), ComposedCache()
    both = {"cache": cache, "past_key_values": other()}
    for run in (model, model.model, functools.partial(model.generate, max_new_tokens=2)):
        with pytest.raises(KVPruneError, match=r"^cache= and past_key_values= were both given"):
            run(ids, **both)
    assert cache.seen == 0 and not cache.is_initialized


def test_positions_inside_the_cache_cause_no_deprecation(no_deprecation):
    """The trial that finds a model's rotations hands a stock cache to a stock forward."""
    model: Any = kvprune.attach(fresh_model())
    policy = H2O(4, 4, positions="cache")
    model.generate(prompt(1, 12), cache=ComposedCache([policy]), max_new_tokens=2)


# Seams that a release lacks.


def _owner(owner: Any, name: str) -> Any:
    """Where an attribute is defined: the owner, or one of its base classes."""
    places = owner.__mro__ if isinstance(owner, type) else (owner,)
    return next(place for place in places if name in vars(place))


def _without_argument(function: Any, arguments: tuple[str, ...]) -> Any:
    """The same function, whose signature lacks some arguments."""
    replaced = functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))
    signature = inspect.signature(function)
    left = [p for p in signature.parameters.values() if p.name not in arguments]
    replaced.__dict__["__signature__"] = signature.replace(parameters=left)
    return replaced


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def assert_seam_is_named(model: Any, missing: str, used: str) -> None:
    """Refused with all that a user needs to know, and without a word against the user."""
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(KVPruneError) as refused:
        kvprune.attach(model)
    message = str(refused.value)
    assert missing in message and used in message
    assert f"transformers {transformers.__version__}" in message
    assert "no fault of your code" in message and ", ".join(TESTED) in message
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert "forward" not in model.__dict__ and "generate" not in model.__dict__


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{_names(seam.name)[0]}: {seam.used}")
def test_a_seam_that_is_missing_is_named(monkeypatch, seam: Seam):
    """Each seam is taken away in turn: the attribute, under all its names."""
    model = fresh_model()
    owner = seam.of(model)
    for name in _names(seam.name):
        if owner is releases.GenerationMode:
            # Members of an enum cannot be deleted.
            left = {mode.name: mode for mode in owner if mode.name != name}
            monkeypatch.setattr(releases, "GenerationMode", SimpleNamespace(**left))
        elif hasattr(owner, name):
            monkeypatch.delattr(_owner(owner, name), name)
    assert_seam_is_named(model, _names(seam.name)[0], seam.used)


ARGUMENTS = [(seam, argument) for seam in SEAMS for argument in seam.takes]


@pytest.mark.parametrize(("seam", "argument"), ARGUMENTS, ids=lambda x: str(getattr(x, "name", x)))
def test_an_argument_that_is_missing_is_named(monkeypatch, seam: Seam, argument: Any):
    """Each argument of each seam that is a function is taken away in turn."""
    model, name = fresh_model(), _names(seam.name)[0]
    owner = _owner(seam.of(model), name)
    function = _without_argument(getattr(owner, name), _names(argument))
    monkeypatch.setattr(owner, name, function)
    assert_seam_is_named(model, _names(argument)[0], seam.used)


@pytest.mark.parametrize("part", ["base", "layer"])
def test_a_cache_by_an_unknown_name_is_named(monkeypatch, part):
    """As if a release renamed the cache once more."""
    model: Any = fresh_model()
    kind = type(model.model if part == "base" else model.model.layers[0])
    arguments = CALLED.takes[0]
    assert isinstance(arguments, tuple)
    monkeypatch.setattr(kind, "forward", _without_argument(kind.forward, arguments))
    assert_seam_is_named(model, f"cache or past_key_values or layer_past of {kind.__name__}", "")


@pytest.mark.parametrize("name", ["_mask_length", "_pad_token_tensor"])
def test_a_note_that_generate_no_longer_makes_is_named(monkeypatch, name):
    """Read before anything is: the cache can be used afterwards."""
    model, cache = tiny_model(), ComposedCache([H2O(4, 4)])
    original = kvprune.attach.__globals__["prepare_cache_for_generation"]

    def prepare(model, generation_config, *args, **kwargs):
        del generation_config.__dict__[name]
        return original(model, generation_config, *args, **kwargs)

    monkeypatch.setitem(
        model.__dict__, "_prepare_cache_for_generation", functools.partial(prepare, model)
    )
    with pytest.raises(KVPruneError, match=f"GenerationConfig.{name} was not found"):
        model.generate(prompt(1, 9), cache=cache, max_new_tokens=2)
    assert cache.seen == 0
    monkeypatch.undo()
    model.generate(prompt(1, 9), cache=cache, max_new_tokens=2)
    assert cache.seen == 10


def test_what_the_project_says_of_releases_is_one_thing():
    """The oldest that can be installed and the pinned one are those that were tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [d for d in project["dependencies"] if d.startswith("transformers")]
    assert wanted == [f"transformers>={TESTED[0]}"]
    assert f"transformers=={TESTED[-1]}\n" in (ROOT / "constraints.txt").read_text()
    assert f"transformers {TESTED[0]} to {TESTED[-1]}" in (ROOT / "README.md").read_text()
