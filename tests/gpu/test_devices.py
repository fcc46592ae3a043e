"""Models over two GPUs, or with layers that are kept on the CPU, against the same on one GPU.

Skipped without CUDA, the former also with one GPU. Nothing of this has been run by those who wrote
it: see docs/gpu.md.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvprune

pytest.importorskip("accelerate")

from ..models.test_devices import ALL
from ..models.test_offload import dispatched
from ..support.models import fresh_model, left_padded, prompt
from ..support.turns import STEPS, follow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
PLACES = [
    pytest.param(
        (0, 1), marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    ),
    (0, "cpu"),
]


def on_one() -> Any:
    model: Any = fresh_model()
    return kvprune.attach(model.to("cuda:0"))


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("name", ALL)
def test_every_step_is_that_of_one_gpu(name, padding, places, tmp_path):
    """In float64; the very columns."""
    spread = kvprune.attach(dispatched(*places, tmp_path))
    mine, held = follow(spread, ALL[name](), STEPS, [0, padding])
    theirs, expected = follow(on_one(), ALL[name](), STEPS, [0, padding])
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    for index, (here, there) in enumerate(zip(held.layers, expected.layers, strict=True)):
        assert torch.equal(here.columns.cpu(), there.columns.cpu())
        second = places[1] == 1 and index > 1
        assert here.keys.device == torch.device("cuda", int(second))


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["dense", "H2O", "StreamingLLM", "inside"])
def test_generate_and_a_saved_cache(name, beams, places, tmp_path):
    """The tokens of one GPU; a cache that was saved there goes on here."""
    inputs = {n: t.to("cuda:0") for n, t in left_padded(prompt(2, 30), [0, 7]).items()}
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    tokens, caches = [], []
    one, spread = on_one(), kvprune.attach(dispatched(*places, tmp_path))
    for model in (one, spread):
        caches.append(kvprune.ComposedCache(ALL[name]()))
        tokens.append(model.generate(**inputs, cache=caches[-1], **options).cpu())
    assert torch.equal(*tokens)
    caches[0].save(tmp_path / "cache")
    loaded = kvprune.ComposedCache.load(tmp_path / "cache", ALL[name](), spread)
    new = prompt(loaded.batch_size, 1).to("cuda:0")
    with torch.no_grad():
        logits = [spread(new, past_key_values=c).logits.cpu() for c in (loaded, caches[1])]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-10)
