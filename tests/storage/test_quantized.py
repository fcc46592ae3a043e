"""Keys and values in few bits: what is read back, what it weighs, and who is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import DynamicCache

import kvprune
from kvprune import ComposedCache, KVPruneError, Quantized
from kvprune.attention import native
from kvprune.attention.hadamard import hadamard
from kvprune.policies import H2O, StreamingLLM
from kvprune.policy.views import SlotView
from kvprune.statistics import Queries
from kvprune.testing.stand_ins import ReadBack

from ..support.models import fresh_model, left_padded, prompt, tiny_model
from ..support.naive_codes import read_back, turned

STORES = [
    Quantized(bits, group, rotate)
    for bits in (4, 8, (5, 4))
    for group in (8, 16)
    for rotate in (True, False)
]
STORES.append(Quantized())
every_store = pytest.mark.parametrize("store", STORES, ids=repr)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random numbers, with one in sixteen much larger."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    numbers[..., ::16] *= 8
    return numbers.to(dtype)


@pytest.fixture(params=["kernels", "torch"])
def _either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are written and read by kernels for a CPU, or by torch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_imported", lambda: None)


@pytest.mark.usefixtures("_either")
@every_store
@pytest.mark.parametrize("size", [16, 48, 64, 80])
def test_what_is_read_back_is_what_the_oracle_says(store, size):
    keys, values = drawn(2, 2, 5, size), drawn(2, 2, 5, size, seed=1)
    held = store.of(keys[:, :, :3], values[:, :, :3])
    held.append(keys[:, :, 3:4], values[:, :, 3:4], 3)
    held.append(keys[:, :, 4:], values[:, :, 4:], 4)
    for got, given, bits in zip(
        (held.keys(5), held.values(5)), (keys, values), store.each, strict=True
    ):
        for mine, vector in zip(got.flatten(0, 2), given.flatten(0, 2), strict=True):
            group = store.group_of(size)
            expected = read_back(vector.numpy(), bits, group, store.rotate)
            torch.testing.assert_close(mine, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 8, 12, 64, 80, 96, 576])
def test_the_rotation_is_hadamards_and_undoes_itself(size):
    vectors = drawn(3, size)
    got = hadamard(vectors)
    for mine, vector in zip(got, vectors, strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(turned(vector.numpy())))
    torch.testing.assert_close(hadamard(got), vectors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_model(dtype):
    held = Quantized(8, 16).of(drawn(1, 2, 3, 32, dtype=dtype), drawn(1, 2, 3, 16, dtype=dtype))
    assert held.keys(3).dtype == held.values(3).dtype == held.dtype == dtype


def test_equal_numbers_are_read_back_as_they_are():
    keys = torch.full((1, 1, 2, 16), -0.5)
    held = Quantized(4, 16, rotate=False).of(keys, torch.zeros_like(keys))
    assert torch.equal(held.keys(2), keys) and not held.values(2).any()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e6])
def test_what_half_precision_does_not_hold_is_not_finite_in_its_own_vector_alone(wrong):
    keys = drawn(1, 1, 2, 32)
    keys[0, 0, 0, 0] = wrong
    found = Quantized(4, 16, rotate=False).of(keys, keys).keys(2)
    assert not found[0, 0, 0, :16].isfinite().any() and found[0, 0, 1].isfinite().all()


def test_bytes_are_exactly_the_share_that_is_promised():
    states = torch.zeros(1, 1, 10, 64)
    for store, share in (
        (Quantized(4, 32), 0.3125),
        (Quantized(), 0.3125),
        (Quantized(8), 0.53125),
    ):
        held = store.of(states, states)
        assert sum(tensor.nbytes for tensor in held.tensors()) / (2 * 10 * 64 * 2) == share


@dataclass(frozen=True)
class Reads(kvprune.TokenPolicy):
    """Reads keys, and keeps everything."""

    read: list[tuple[str, ...]] = field(default_factory=list)

    def rank_slots(self, slots: SlotView) -> None:
        assert slots.keys.shape[1] == slots.heads
        self.read.append(tuple(slots.stored.made))


def test_a_policy_is_shown_keys_as_the_model_made_them_and_what_it_asks_for_alone():
    model, policy = tiny_model("llama"), Reads()
    cache, plain = (ComposedCache([policy], store=store) for store in (Quantized(8, 8), None))
    for each in (cache, plain):
        model(prompt(1, 12), past_key_values=each)
    assert set(policy.read) == {("keys",)}
    for mine, other in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, rtol=0.1, atol=0.1)


class Writes(kvprune.TokenPolicy):
    """Writes into the keys that it is shown."""

    def rank_slots(self, slots: SlotView) -> None:
        slots.keys.zero_()


@pytest.mark.parametrize("store", [None, Quantized(8, 8)])
def test_a_policy_that_writes_into_keys_is_refused(store):
    with pytest.raises(KVPruneError, match="wrote into its view at layer 0"):
        tiny_model("llama")(prompt(1, 9), past_key_values=ComposedCache([Writes()], store=store))


def test_the_bytes_of_a_cache_are_those_of_its_codes():
    model = tiny_model("llama")
    cache, plain = (ComposedCache(store=store) for store in (Quantized(4, 8), None))
    for each in (cache, plain):
        model(prompt(1, 1000), past_key_values=each)
    # Of float64, 8 bytes a number; 4 bits, and 32 for a group of 8, are one byte.
    columns = cache.layers[0].columns.nbytes
    assert cache.nbytes - plain.nbytes < 0
    assert (plain.nbytes - columns) / (cache.nbytes - columns) == pytest.approx(8, rel=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantized(3), "bits=3: expected 4, 5 or 8"),
        (lambda: Quantized(True), "bits=True: expected 4, 5 or 8"),
        (lambda: Quantized(cast(int, 8.0)), "bits=8.0: expected 4, 5 or 8"),
        (lambda: Quantized(cast(Any, (4, 4, 4))), "expected 4, 5 or 8, or two of these"),
        (lambda: Quantized(4, 0), "group=0: expected how many"),
        (lambda: Quantized(4, 7), "group=7: expected how many .* an even number"),
        (lambda: Quantized(4, 32, rotate=cast(bool, 1)), "rotate=1: expected True or False"),
        (lambda: ComposedCache(store=cast(Any, Quantized)), "expected a store, as kvprune.Quant"),
        (lambda: ComposedCache(store=cast(Any, 4)), "store=4: expected a store"),
    ],
)
def test_bad_stores_are_refused(make: Any, message: str):
    with pytest.raises(KVPruneError, match=message):
        make()


def test_a_group_that_does_not_divide_the_head_size_is_refused_before_anything_is_read():
    cache = ComposedCache(store=Quantized(4, 32))
    with pytest.raises(KVPruneError, match=r"have 8 numbers a head: .* one of \[2, 4, 8\]"):
        tiny_model("llama")(prompt(1, 4), past_key_values=cache)
    assert cache.seen == 0 and cache.binding is None
    # The cache was not spoilt: it may be used with a model that fits.
    cache.reset()


def test_codes_have_no_gradients():
    model = tiny_model("llama")
    embeddings = model.get_input_embeddings()(prompt(1, 5)).detach().requires_grad_()
    cache = ComposedCache(store=Quantized(4, 8))
    expected = pytest.raises(KVPruneError, match=r"expected a forward within torch.no_grad\(\)")
    with expected, torch.enable_grad():
        model(inputs_embeds=embeddings, past_key_values=cache)


@pytest.mark.parametrize("other", [None, Quantized(8, 8), Quantized(4, 4)])
def test_a_file_of_another_store_is_refused(tmp_path: Path, other):
    model = tiny_model("llama")
    for store, wanted in ((Quantized(4, 8), other), (other, Quantized(4, 8))):
        cache = ComposedCache([H2O(4, 4)], store=store)
        model(prompt(1, 20), past_key_values=cache)
        cache.save(tmp_path / "cache")
        with pytest.raises(KVPruneError, match="expected the same store"):
            ComposedCache.load(tmp_path / "cache", [H2O(4, 4)], model, wanted)


def test_sinks_inside_the_cache_turn_copies_of_what_is_held():
    """What is held in codes is never coded anew, however long the stream."""
    model = tiny_model("llama")
    cache = ComposedCache([StreamingLLM(2, 6, positions="cache")], store=Quantized(8, 8))
    model(prompt(1, 8), past_key_values=cache)
    layer = cache.layers[0]

    def sinks() -> torch.Tensor:
        place = [int((layer.columns[0, 0] == column).nonzero()) for column in (0, 1)]
        return layer.rectangles[0].held.named_tensors(layer.used)["codes"][:, :, place]

    before = sinks()
    for token in prompt(1, 40).split(1, 1):
        model(token, past_key_values=cache)
    assert torch.equal(sinks(), before)


def test_with_no_store_nothing_is_new():
    model = tiny_model("llama")
    one, two = ComposedCache(), DynamicCache(config=model.config)
    got = model.generate(prompt(1, 9), cache=one, max_new_tokens=5)
    assert torch.equal(got, model.generate(prompt(1, 9), cache=two, max_new_tokens=5))
    assert one.store is None and "store" not in repr(one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_store
def test_autocast_writes_and_reads_the_same(store, dtype):
    model = fresh_model(dtype=torch.float32, hidden_size=64, head_dim=16)
    kvprune.attach(model)
    keys = drawn(1, 2, 6, 16, dtype=torch.float32)
    held = store.of(keys, keys)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        under = store.of(keys, keys)
        assert torch.equal(under.keys(6), held.keys(6))
        cache = ComposedCache([H2O(4, 4)], store=store)
        for ids in (prompt(1, 12), prompt(1, 1), prompt(1, 1)):
            assert model(ids, past_key_values=cache).logits.isfinite().all()


def test_autocast_goes_on_where_buffers_are_put_together(tmp_path):
    """Of scales in half precision, which autocast on a CPU refuses to put together itself."""
    # So that keys want no gradient, which codes do not have.
    model = kvprune.attach(fresh_model(dtype=torch.float32)).requires_grad_(False)
    padded, store = left_padded(prompt(3, 120), [0, 60, 100]), Quantized()
    with torch.autocast("cpu", torch.bfloat16):
        cache = ComposedCache([H2O(0.2, 0.1)], store=store)
        model(**padded, past_key_values=cache)
        assert len(cache.layers[0].rectangles) > 1
        cache.save(tmp_path / "cache.safetensors")
        loaded = cache.load(tmp_path / "cache.safetensors", cache.policies, model, store)
        for each in (cache, loaded):
            each.batch_select_indices(torch.tensor([0]))
            assert len(each.layers[0].rectangles) == 1
            with torch.enable_grad():
                found = model(prompt(1, 1), past_key_values=each).logits
            assert found.isfinite().all()


@pytest.mark.parametrize("size", [1e-7, 1e-6, 1e-5, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("bits", [8, 5, 4])
def test_nothing_is_read_back_worse_than_the_mean_of_its_group(bits, size):
    keys = drawn(1, 1, 64, 64, dtype=torch.float32) * size
    lost = Quantized(bits, 32).of(keys, keys).keys(64) - keys
    assert lost.norm() <= 1.01 * keys.norm()
    if size >= 1e-3:
        assert lost.norm() <= 0.08 * keys.norm()


def test_finite_keys_of_half_precision_are_read_back_finite():
    """Turned, they are longer than half precision has numbers: 72,000 here."""
    keys = torch.full((1, 1, 1, 64), 9000.0, dtype=torch.float16)
    assert (Quantized(8, 32).of(keys, keys).keys(1) - keys).abs().max() <= 9000 / 255


@pytest.mark.parametrize("kind", [StreamingLLM, H2O])
def test_positions_inside_the_cache_are_those_without_a_store(kind):
    policy = kind(3, 5, positions="cache")
    model, found = tiny_model("llama"), []
    for store in (None, Quantized(8, 2)):
        cache = ComposedCache([policy], store=store)
        steps = [prompt(2, 12), *prompt(2, 12, seed=3).split(1, 1)]
        logits = [model(ids, past_key_values=cache).logits[:, -1] for ids in steps]
        found.append(torch.stack(logits))
    # Another position moves logits by whole units.
    assert (found[0] - found[1]).abs().max() < 0.2


def test_attentions_are_those_of_the_stock_function():
    model, found = fresh_model(backend="eager", dtype=torch.bfloat16), []
    kvprune.attach(model)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 16] = 0
    for store in (None, Quantized(8, 2)):
        cache = ComposedCache(store=store)
        model(prompt(2, 16), past_key_values=cache)
        more = {"past_key_values": cache, "output_attentions": True}
        found.append(model(prompt(2, 1), attention_mask=mask, **more).attentions[0])
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    torch.testing.assert_close(*found, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("store", [Quantized(8, 8), Quantized(), Quantized(4, 16)], ids=repr)
def test_a_layer_is_read_in_blocks(store, monkeypatch):
    keys, queries, weights = drawn(2, 2, 11, 16), drawn(2, 2, 3, 16), drawn(2, 2, 3, 11)
    (coded, _), found = store.of(keys, keys).coded(11), []
    for block in (1 << 12, 4, 1):
        monkeypatch.setattr("kvprune.attention.coded.BLOCK", block)
        each = [coded.vectors(torch.float64)]
        for turn in (False, True):
            each += [coded.products(queries, turn), coded.weighted(weights, turn)]
        found.append(each)
    vectors = found[0][0]
    expected = [vectors, queries @ vectors.mT, weights @ vectors]
    expected += [hadamard(queries) @ vectors.mT, hadamard(weights @ vectors)]
    for each in found:
        for mine, other in zip(each, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-11)


@dataclass(frozen=True)
class ReadsAll(kvprune.TokenPolicy):
    """Reads the keys of all layers, one after the other.

    together: how many layers may be there as read.
    """

    together: int = 1
    statistics = (Queries(2),)

    def rank_layers(self, layers):
        answers = []
        for view in layers:
            score = view.keys.square().sum(-1) + view.looks(2).sum((2, 3))
            assert sum(bool(each.stored.made) for each in layers) <= self.together
            budget = torch.full((len(score),), 5)
            answers.append(kvprune.Ranking(score, torch.zeros_like(view.valid), budget))
        return answers


def test_over_all_layers_one_layer_is_read_back_at_a_time():
    model, found = tiny_model("llama"), []
    for store, together in ((Quantized(8, 8), 1), (ReadBack(8, 8), 4)):
        policy = ReadsAll(together)
        cache = ComposedCache([policy], store=store)
        model(prompt(2, 12), past_key_values=cache)
        found.append([cache.columns(layer) for layer in range(len(cache))])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
