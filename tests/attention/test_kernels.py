"""The Triton kernels on CPU: interpreted against the oracle, and compiled for CUDA.

Skipped without Triton, which is no part of `.[dev]` (a wheel of 200 MB). To run them:

    .venv/bin/pip install triton
    TRITON_INTERPRET=1 .venv/bin/python -m pytest tests/attention/test_kernels.py
    .venv/bin/python -m pytest tests/attention/test_kernels.py -m ""

Triton reads TRITON_INTERPRET while it is imported, so the first command runs the kernels as
NumPy and skips the compiler; the second one compiles them (ptxas comes with the wheel, and no
GPU is needed) and skips the interpreter. NumPy has no bfloat16, so that is only compiled.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from kvprune.attention import received as in_torch

from ..support.received_cases import CASES, case

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton without TRITON_INTERPRET=1")


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's -inf, as meant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_equal_the_oracle(name, dtype):
    """Several blocks; to a few float32 roundings."""
    from kvprune.attention import kernels

    this = case(**CASES[name]).to(dtype)
    expected = in_torch.log_sum_exp_in_torch(*this.arguments())
    lse = kernels.log_sum_exp(*this.arguments())
    torch.testing.assert_close(lse, expected, rtol=2e-6, atol=2e-6)
    expected = in_torch.attention_received_in_torch(*this.with_lse(lse))
    received = kernels.attention_received(*this.with_lse(lse))
    torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_kernels_go_by_strides():
    """Views as attention holds them: buffers with room to spare, heads behind tokens, cuts."""
    from kvprune.attention import kernels

    this = case(old=0).to(torch.float32)
    lse = kernels.log_sum_exp(*this.arguments())
    received = kernels.attention_received(*this.with_lse(lse))
    spare = torch.full((2, 2, 90, 24), torch.nan)
    spare[:, :, :70] = this.key
    query = this.query.transpose(1, 2).contiguous().transpose(1, 2)
    columns = torch.full((2, 2, 90), -7)
    columns[..., :70] = this.slot_columns
    backwards = this.key.transpose(-1, -2).contiguous().transpose(-1, -2)
    for key in (spare[:, :, :70], backwards):
        arguments = (query, key, this.query_columns, columns[..., :70], 0.3)
        assert torch.equal(kernels.log_sum_exp(*arguments), lse)
        later = kernels.attention_received(query, key, lse, *arguments[2:])
        assert torch.equal(later, received)


SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}


def signature(function: Any, dtype: str) -> dict[str, str]:
    """Types of a kernel's arguments, as a launch finds them."""
    kinds = dict.fromkeys(("query", "key"), f"*{dtype}")
    kinds |= dict.fromkeys(("lse", "mass"), "*fp32") | {"window": "i64"}
    kinds |= dict.fromkeys(("query_columns", "slot_columns"), "*i64")
    kinds |= dict.fromkeys(("scaling", "softcap"), "fp32")
    kinds |= dict.fromkeys(("CAPPED", "BLOCK", "BLOCK_D"), "constexpr")
    return {name: kinds.get(name, "i32") for name in function.arg_names}


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("kernel", ["_mass_kernel", "_lse_kernel"])
def test_the_kernels_compile_for_cuda(kernel, size, dtype, tmp_path, monkeypatch):
    """To machine code of A100 and H100, within the shared memory that every GPU has (48 KB)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kvprune.attention import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    key = torch.empty(1, 1, 1, size, dtype=torch.float32 if dtype == "fp32" else torch.float16)
    block, depth = kernels._blocks(key)
    function: Any = getattr(kernels, kernel)
    for architecture in (80, 90):
        constants = {"CAPPED": True, "BLOCK": block, "BLOCK_D": depth}
        source = ASTSource(function, signature(function, dtype), constants)
        target = GPUTarget("cuda", architecture, 32)
        made = triton.compile(source, target=target, options={"num_stages": 2})
        assert made.asm["cubin"] and made.metadata.shared <= 48 << 10
