"""Kernels over codes for a CPU, against torch's operators, which are tested against an oracle."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import kvprune
import kvprune.attention
from kvprune import ComposedCache, Quantized
from kvprune.attention import native
from kvprune.policies import H2O
from kvprune.storage.quantized import QuantizedSlots

from ..support.models import fresh_model, prompt

STORES = [
    Quantized(),
    Quantized(bits=8, group=32),
    Quantized(bits=(4, 8), group=16),
    Quantized(bits=(8, 5), group=32),
    Quantized(bits=4, group=32, rotate=False),
]
SIZES = [(64, 64), (128, 64), (192, 64)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs something as if numba were not installed."""

    def run(what: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(native, "_imported", lambda: None)
            return what()

    return run


def vectors(sizes: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Keys and values `[2, 3, 40, D]` of many lengths, some of which are constant."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        many = torch.randn(2, 3, 40, size, generator=generator, dtype=torch.float64)
        many *= 10.0 ** torch.linspace(-6, 3, 40, dtype=torch.float64)[:, None]
        many[0, 0, 0] = 0
        many[0, 1, 1] = 2
        found.append(many.to(dtype))
    return found


def read_back(held: QuantizedSlots, used: int) -> list[torch.Tensor]:
    """All that is asked of codes: vectors, products with queries, sums by weights."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for coded in held.coded(used):
        shape = coded.codes.shape
        wide = torch.promote_types(held.dtype, torch.float32)
        queries = torch.randn(*shape[:2], 3, coded.size, generator=generator, dtype=wide)
        weights = torch.rand(*shape[:2], 3, used, generator=generator, dtype=wide).softmax(-1)
        found.append(coded.vectors(wide))
        for turn in (False, True):
            found += [coded.products(queries, turn), coded.weighted(weights, turn)]
    return found


def held_of(store: Quantized, sizes: tuple[int, int], dtype: torch.dtype) -> QuantizedSlots:
    """Slots that were appended behind others, with room for more."""
    keys, values = vectors(sizes, dtype)
    held = store.of(keys[:, :, :15], values[:, :, :15])
    held.append(keys[:, :, 15:], values[:, :, 15:], 15)
    return held


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, (32, 32)], ids=str)
@pytest.mark.parametrize("store", STORES, ids=repr)
def test_codes_are_read_as_torch_reads_them(store, sizes, dtype, without):
    """The very same codes: in a buffer that has room for more, so that lanes are apart in it."""
    if 32 in sizes and 5 in store.each:
        pytest.skip("five bits of small vectors are read by torch")
    held = held_of(store, sizes, dtype)
    found, expected = read_back(held, 38), without(lambda: read_back(held, 38))
    assert all(coded._kernels is not None for coded in held.coded(38))
    for got, wanted in zip(found, expected, strict=True):
        near = 64 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=0, atol=near)


@pytest.mark.parametrize("sizes", [*SIZES, (8, 24), (80, 80)], ids=str)
@pytest.mark.parametrize("store", STORES, ids=repr)
def test_codes_are_written_as_torch_writes_them(store, sizes, without):
    """In float64 no number is so near to the middle of two codes that rounding decides."""
    if any(size % (store.group or 1) for size in sizes):
        pytest.skip("the group does not divide these sizes")
    held = held_of(store, sizes, torch.float64)
    expected = without(lambda: held_of(store, sizes, torch.float64))
    # The grids, and what codes stand for: with a scale of 0 that is the same for all codes.
    assert torch.equal(held.buffers[1][:, :, :40], expected.buffers[1][:, :, :40])
    for got, wanted in zip(held.coded(40), expected.coded(40), strict=True):
        read = [without(lambda one=one: one.vectors(torch.float64)) for one in (got, wanted)]
        assert torch.equal(*read)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("store", STORES, ids=repr)
def test_in_all_dtypes_as_much_is_lost_as_by_torch(store, dtype, without):
    """A number in the middle of two codes may get either, where sums are rounded."""
    keys, values = vectors((64, 64), dtype)
    held, other = store.of(keys, values), without(lambda: store.of(keys, values))
    for mine, theirs, given in (
        (held.keys(40), other.keys(40), keys),
        (held.values(40), other.values(40), values),
    ):
        lost, wanted = ((each - given).double().norm(dim=-1).sum((0, 1)) for each in (mine, theirs))
        torch.testing.assert_close(lost, wanted, rtol=0.01, atol=0)


def test_a_vector_that_is_not_finite_leaves_no_other_s_codes():
    """Bytes of a file do not depend on what was in memory before."""
    keys, values = vectors((64, 64), torch.float32)
    keys[1, 2, 7, 5] = torch.nan
    coded = Quantized().of(keys, values).coded(40)[0]
    assert not coded.codes[1, 2, 7].any()


def test_layouts(without):
    """Keys and values that are parts of one tensor; codes of rows that are expanded, or one."""
    fused = torch.randn(2, 5, 3, 192, dtype=torch.float64).transpose(1, 2)
    keys, values = fused[..., :64], fused[..., 64:128]
    store = Quantized()
    held, expected = store.of(keys, values), without(lambda: store.of(keys, values))
    assert all(torch.equal(*each) for each in zip(held.buffers, expected.buffers, strict=True))
    coded = held.coded(5)[0]
    for part in (slice(1, 2), slice(0, 1)):
        some = replace(coded, codes=coded.codes[part], grid=coded.grid[part])
        many = replace(
            some, codes=some.codes.expand(4, -1, -1, -1), grid=some.grid.expand(4, -1, -1, -1)
        )
        queries = torch.randn(4, 3, 2, 64, dtype=torch.float64)
        found, wanted = many.products(queries), without(partial(many.products, queries))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_of_queries_go_by_torch(without):
    keys, values = vectors((64, 64), torch.float64)
    coded = Quantized().of(keys, values).coded(40)[0]
    queries = torch.randn(2, 3, 2, 64, dtype=torch.float64, requires_grad=True)
    coded.products(queries).sum().backward()
    wanted = coded.vectors(torch.float64).sum(2, keepdim=True).expand_as(queries)
    torch.testing.assert_close(queries.grad, wanted)


def test_the_default_device_changes_nothing():
    keys, values = vectors((64, 64), torch.float64)
    expected = Quantized().of(keys, values)
    with torch.device("meta"):
        held = Quantized().of(keys, values)
        read = held.coded(40)[0].vectors(torch.float64)
    assert all(torch.equal(*each) for each in zip(held.buffers, expected.buffers, strict=True))
    assert torch.equal(read, expected.coded(40)[0].vectors(torch.float64))


def test_many_vectors_are_left_to_many_threads(monkeypatch):
    many = torch.empty(native.MANY + 1, 8)
    assert native.cpu_kernels_for(many) is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert native.cpu_kernels_for(many) is None
    assert native.cpu_kernels_for(many[1:]) is not None


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan, 1e9])
@pytest.mark.parametrize("store", STORES, ids=repr)
def test_what_is_not_finite_is_so_in_its_own_vector_alone(store, wrong, without):
    keys, values = vectors((64, 64), torch.float32)
    keys[1, 2, 7, 5] = wrong
    held = store.of(keys, values)
    other = without(lambda: store.of(keys, values))
    for slots in (held, other):
        for found in (slots.coded(40)[0].vectors(torch.float32), slots.keys(40)):
            bad = ~found.isfinite().all(-1)
            assert bad.nonzero().tolist() == [[1, 2, 7]]


@pytest.mark.parametrize(
    "number",
    [0.0, 1.0, 0.1, 1e-8, 5.96e-8, 3e-8, 2.98e-8, 6.1e-5, 65503.9, 65520.0, 2049.0, 2051.0],
)
def test_numbers_are_rounded_to_half_precision_as_torch_does(number):
    kernels = native._imported()
    assert kernels is not None
    for each in (number, -number):
        assert kernels._half(each) == float(torch.tensor(each, dtype=torch.float64).half())


def test_sizes_that_are_no_whole_words_are_read_by_torch():
    """Eight bytes are read at once: five bits of 24 numbers are fifteen bytes."""
    keys, values = vectors((24, 24), torch.float32)
    assert all(coded._kernels is None for coded in Quantized().of(keys, values).coded(40))


def test_without_numba_torch_does_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "kvprune.attention.cpu_kernels", raising=False)
    monkeypatch.delattr(kvprune.attention, "cpu_kernels", raising=False)
    native._imported.cache_clear()
    try:
        assert native.cpu_kernels_for(torch.zeros(1)) is None
    finally:
        native._imported.cache_clear()


def test_a_compiler_and_tensors_without_numbers_are_given_none(monkeypatch):
    with torch._subclasses.FakeTensorMode():
        assert native.cpu_kernels_for(torch.zeros(1)) is None
    assert native.cpu_kernels_for(torch.zeros(1, device="meta")) is None
    assert native.cpu_kernels_for(torch.zeros(1)) is not None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    # A number of threads is no part of a graph.
    monkeypatch.setattr(torch, "get_num_threads", lambda: pytest.fail("a compiler came here"))
    assert native.cpu_kernels_for(torch.zeros(native.MANY + 1, 1)) is None
    assert native.cpu_kernels_for(torch.zeros(1)) is None


def test_a_model_decodes_as_without_kernels(without, monkeypatch):
    """Heads of 64 numbers; two rows, whose tokens go by H2O."""
    kernels, ran = native._imported(), Counter[str]()
    assert kernels is not None

    def counted(name: str, kernel: Callable[..., None], *args: Any) -> None:
        ran[name] += 1
        kernel(*args)

    for name in ("write", "read"):
        monkeypatch.setattr(kernels, name, partial(counted, name, getattr(kernels, name)))
    over_vectors = kernels.over_vectors

    def counted_over_vectors(*kind: Any) -> list[Callable[..., None]]:
        each = zip(("products", "weighted"), over_vectors(*kind), strict=True)
        return [partial(counted, name, kernel) for name, kernel in each]

    monkeypatch.setattr(kernels, "over_vectors", counted_over_vectors)
    model = kvprune.attach(fresh_model("llama", head_dim=64, hidden_size=64))
    ids = prompt(2, 20)

    def run() -> Any:
        cache = ComposedCache([H2O(4, 8)], store=Quantized())
        return model.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=12,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    found = run()
    before = ran.copy()
    expected = without(run)
    assert ran == before and set(ran) == {"write", "read", "products", "weighted"}
    assert found.sequences.tolist() == expected.sequences.tolist()
    for got, wanted in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
