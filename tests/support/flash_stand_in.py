"""flash-attn's function in plain torch, with its documented signature, for machines without one.

It refuses what the package refuses, but for the device, and notes what it was asked.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as stock
from torch import Tensor


@dataclass
class FlashStandIn:
    """What stands for the package; `dtypes` are those it takes (the package: half precision)."""

    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        """`[B, Q, Hq, D]`, `[B, S, Hkv, D]` twice; causal counts from the bottom right."""
        self._check(q, k, v, dropout_p, softcap)
        # Where there is dropout, the probabilities that come back are n x n.
        assert not (return_attn_probs and dropout_p)
        wanted = {"window_size": window_size, "softcap": softcap, "dropout_p": dropout_p}
        self.calls.append({**wanted, "queries": q.shape[1], "lse": return_attn_probs})
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        precision = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(precision) @ keys.to(precision).transpose(-1, -2) * scale
        scores = torch.tanh(scores / softcap) * softcap if softcap else scores
        left, right = window_size[0], 0 if causal else window_size[1]
        sees = self._sees(q.shape[2], k.shape[2], left, right)
        scores = scores.masked_fill(~sees, -torch.inf)
        shares = torch.nn.functional.dropout(scores.softmax(-1), dropout_p)
        out = (shares @ values.to(precision)).to(q.dtype).transpose(1, 2).contiguous()
        return (out, scores.logsumexp(-1), None) if return_attn_probs else out

    def _check(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, softcap: float) -> None:
        for x in (q, k, v):
            assert x.dim() == 4 and x.dtype == q.dtype and x.dtype in self.dtypes
            assert x.stride(-1) == 1, "the last dimension has to be contiguous"
            assert x.shape[0] == q.shape[0] and x.shape[-1] == q.shape[-1] <= 256
        assert k.shape == v.shape and q.shape[2] % k.shape[2] == 0
        assert not (dropout and softcap), "softcapping does not support dropout"

    def _sees(self, queries: int, slots: int, left: int, right: int) -> Tensor:
        at = torch.arange(queries)[:, None] + slots - queries
        distance = torch.arange(slots)[None] - at
        return ((left < 0) | (distance >= -left)) & ((right < 0) | (distance <= right))

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ) -> Any:  # fmt: skip
        """For padded batches, which no test runs."""
        raise AssertionError("not expected")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Becomes the package `flash_attn`, also for transformers, and CUDA is everywhere."""
        package, padding = types.ModuleType("flash_attn"), types.ModuleType("bert_padding")
        vars(package).update(
            __spec__=ModuleSpec("flash_attn", None),
            flash_attn_func=self.flash_attn_func,
            flash_attn_varlen_func=self.flash_attn_varlen_func,
            flash_attn_with_kvcache=None,
            bert_padding=padding,
        )
        vars(padding).update(pad_input=None, unpad_input=None)
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
        monkeypatch.setattr(stock, "is_flash_attn_2_available", lambda: True)
        matrix = stock.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
        monkeypatch.setitem(matrix, "general_availability_check", lambda: True)
        for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_pad_fn",
                     "_flash_with_kvcache_fn", "_unpad_fn", "_process_flash_kwargs_fn",
                     "_process_with_kvcache_kwargs_fn"):  # fmt: skip
            monkeypatch.setattr(stock, name, None)
        monkeypatch.setattr("kvprune.attention.received.on_gpu", lambda tensor: True)
        monkeypatch.setattr("kvprune.attention.flash.HALF", self.dtypes)
