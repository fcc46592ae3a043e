"""Models whose weights accelerate brings when they are needed: the very numbers of any other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import kvprune
from kvprune import KVPruneError
from kvprune.models.devices import device_of, devices_of, is_offloaded
from kvprune.models.fingerprint import describe
from kvprune.policies import H2O, StreamingLLM
from kvprune.policies.sdtp import fingerprint, saliency, train

from ..support.models import LAYERS, fresh_model, plain_model, prompt, tiny_model
from ..support.strategies import sdtp_pruner
from ..support.turns import follow
from .test_devices import ALL, same

CPU = torch.device("cpu")


def dispatched(first: str, rest: str, folder: Path, **more: Any) -> Any:
    """With two layers, and what comes before them, in one place, and the others in another."""
    where = {f"model.layers.{i}": first if i < LAYERS // 2 else rest for i in range(LAYERS)}
    where |= {"model.embed_tokens": first, "model.rotary_emb": first}
    where |= {"model.norm": rest, "lm_head": rest}
    model = fresh_model()
    skip = model._skip_keys_device_placement
    return accelerate.dispatch_model(model, where, offload_dir=folder, skip_keys=skip, **more)


MADE: dict[str, Callable[[Path], Any]] = {
    "hooks alone": partial(dispatched, "cpu", "cpu", force_hooks=True),
    "half on disk": partial(dispatched, "cpu", "disk"),
    "first half on disk": partial(dispatched, "disk", "cpu"),
    "all on disk": lambda folder: accelerate.disk_offload(fresh_model(), folder, CPU),
    "all brought": lambda folder: accelerate.cpu_offload(fresh_model(), CPU),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", ALL)
def test_every_step(name, made, tmp_path):
    model = kvprune.attach(MADE[made](tmp_path))
    expected = follow(tiny_model(), ALL[name](), [24, 1, 5], [0, 9])
    same(follow_on_cpu(model, ALL[name]()), expected)


def follow_on_cpu(model: Any, policies: list[Any]) -> Any:
    """`follow`, which goes by `model.device`: the meta device, where that is offloaded first."""
    with pytest.MonkeyPatch.context() as here:
        here.setattr(type(model), "device", CPU)
        return follow(model, policies, [24, 1, 5], [0, 9])


@pytest.mark.parametrize("made", MADE)
def test_what_a_model_is_does_not_depend_on_where_its_weights_are(made, tmp_path):
    """Digests of caches and fingerprints of heads read what is offloaded."""
    model, plain = MADE[made](tmp_path), plain_model()
    assert is_offloaded(model) == (made != "hooks alone") and not is_offloaded(plain)
    assert describe(model) == describe(plain)
    assert fingerprint(model) == fingerprint(plain)
    assert device_of(model) == CPU and devices_of(model) == {CPU}


def test_generate_and_a_saved_cache(tmp_path):
    model, policies = kvprune.attach(MADE["first half on disk"](tmp_path)), [H2O(4, 4)]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    found = []
    for each in (model, tiny_model()):
        cache = kvprune.ComposedCache(policies)
        found.append((each.generate(prompt(1, 20), cache=cache, **options), cache))
    same(*found)
    found[0][1].save(tmp_path / "cache")
    loaded = kvprune.ComposedCache.load(tmp_path / "cache", policies, model)
    same((found[0][0], loaded), found[1])


def test_a_low_rank_head_and_a_stream(tmp_path):
    """What looks at the model itself: rotations, heads."""
    model = kvprune.attach(MADE["all on disk"](tmp_path))
    for policies in ([StreamingLLM(2, 6, positions="cache")], [sdtp_pruner(0.6, 3)]):
        tokens = model.generate(
            prompt(1, 30), cache=kvprune.ComposedCache(policies), max_new_tokens=4
        )
        expected = tiny_model().generate(
            prompt(1, 30), cache=kvprune.ComposedCache(policies), max_new_tokens=4
        )
        assert torch.equal(tokens, expected)


def test_saliency(tmp_path):
    ids = prompt(1, 9)
    assert torch.equal(saliency(MADE["half on disk"](tmp_path), ids), saliency(plain_model(), ids))


def test_training_is_refused(tmp_path):
    match = "train: expected a model with all of its weights on one device, got one on cpu, or off"
    with pytest.raises(KVPruneError, match=match):
        train(MADE["half on disk"](tmp_path), [], tmp_path / "out")
