"""Drives a cache as an attached model's attention modules do, but on random q, k, v.

With the driver, policies meet attention of every shape, far from the shapes of a tiny model, and
an oracle can be given exactly the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BloomConfig
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from ..attention.masks import LazyMask
from ..cache.composed import ComposedCache
from ..models.attachment import Attachment
from ..policy.base import TokenPolicy
from ..positions.rotary import Rotation
from ..statistics import Attention
from ..storage.layout import parting_at_once
from ..storage.quantized import Quantized
from ..wiring.attention import slot_attention
from .oracle import Oracle

D = 8


class _Attention(nn.Module):
    """The attributes of an attention module that the sdpa backend reads."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


class _Base(nn.Module):
    """The attributes of a model that positions inside the cache read: no key is to be rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.Linear(1, 1)])  # its layers
        self.config = BloomConfig(n_layer=1)


@dataclass
class Tokens:
    """One step's random projections.

    Attributes:
        q: `[B, Hq, Q, D]`.
        k: `[B, Hkv, Q, D]`.
        v: `[B, Hkv, Q, D]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class Driver:
    """One layer of attention over random numbers, with a cache of its own.

    Args:
        policies: the policies of the cache.
        rows: the number of rows, B.
        heads: the number of query heads, Hq.
        kv_heads: the number of key/value heads, Hkv.
        seed: the seed of the random numbers.
        window: the sliding window; None for none.
        dtype: the dtype of queries, keys and values.
        sharpness: a factor on the queries; the higher, the sharper is the attention.
        frequencies: the rotary frequencies for positions inside the cache, and for queries before
            rotation; None for no rotation.
        store: how keys and values are held; see `ComposedCache`.
        parting: see `Case`.
    """

    def __init__(
        self,
        policies: list[TokenPolicy],
        rows: int,
        heads: int,
        kv_heads: int,
        seed: int = 0,
        window: int | None = None,
        dtype: torch.dtype = torch.float64,
        sharpness: float = 2.0,
        frequencies: Tensor | None = None,
        store: Quantized | None = None,
        parting: bool = False,
    ) -> None:
        self.parting = parting
        self.cache = ComposedCache(policies, store=store)
        self.rows, self.heads, self.kv_heads = rows, heads, kv_heads
        self.attachment = Attachment("driver", 1, heads)
        self.base = _Base()
        self.base.__dict__["_kvprune"] = self.attachment
        if frequencies is not None:
            rotations = [Rotation(frequencies, 0, interleaved=False)]
            known = {"rotations": rotations, "query rotations": rotations}
            self.attachment.memory.update(known)
        self.cache.bind(self.attachment, self.base)
        self.window, self.dtype, self.sharpness = window, dtype, sharpness
        self.module = _Attention(heads // kv_heads)
        self.generator = torch.Generator().manual_seed(seed)
        self.mask = torch.ones(rows, 0, dtype=torch.long)
        # A number for each row that moves with it, for tests that move rows.
        self.tags = torch.arange(rows, dtype=torch.float64) + 100

    def tokens(self, count: int) -> Tokens:
        """Random projections of the next step's tokens."""

        def draw(heads: int) -> Tensor:
            shape = (self.rows, heads, count, D)
            return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

        return Tokens(draw(self.heads) * self.sharpness, draw(self.kv_heads), draw(self.kv_heads))

    def step(self, tokens: Tokens, padding: list[int] | None = None) -> Tensor:
        """Attends in one forward, in which a row's first `padding[row]` tokens are padding.

        Returns:
            the outputs, `[B, Q, Hq, D]`.
        """
        count = tokens.q.shape[2]
        new = torch.ones(self.rows, count, dtype=torch.long)
        for row, pad in enumerate(padding or []):
            new[row, :pad] = 0
        self.mask = torch.cat([self.mask, new], 1)
        with parting_at_once() if self.parting else nullcontext():
            self.cache.open_step(self.rows, count, self.mask, torch.device("cpu"))
            handle = self.cache.at_layer(0)
            keys, values = self.cache.update(tokens.k, tokens.v, 0)
            output, _ = slot_attention(
                "sdpa", self.module, tokens.q, keys, values, self._rule(), kvprune_layer=handle,
                scaling=D**-0.5,
            )  # fmt: skip
            self.cache.close_step(done=True)
        return output

    def reset(self) -> None:
        """Begins anew, with the same cache."""
        self.cache.reset()
        self.cache.bind(self.attachment, self.base)
        self.mask = self.mask[:, :0]

    def _rule(self) -> LazyMask:
        rule: Any = causal_mask_function
        if self.window is not None:
            rule = sliding_window_causal_mask_function(self.window)
        return LazyMask(rule, plainly_causal=self.window is None)

    def kept(self, row: int, head: int) -> list[int]:
        """The columns that a row and key/value head hold, sorted."""
        columns = self.cache.columns(0)[row]
        mine = columns[head if columns.shape[0] > 1 else 0]
        return [int(c) for c in mine if c >= 0]

    def statistic(self, row: int, head: int) -> dict[int, float]:
        """The accumulated attention of each column that a row and key/value head hold."""
        layer = self.cache.layers[0]
        columns = layer.columns[row, head if layer.columns.shape[1] > 1 else 0]
        received = layer.statistics[Attention()][row, head]
        return {int(c): float(s) for c, s in zip(columns, received, strict=True) if c >= 0}


class Oracles:
    """One oracle per row and key/value head, which is fed the same tokens as the driver.

    Args:
        driver: the driver.
        make: makes the oracle of a row, by its number; see `Oracle`.
    """

    def __init__(self, driver: Driver, make: Callable[[int], Oracle]) -> None:
        self.driver, self.seen = driver, 0
        heads = range(driver.kv_heads)
        self.each = {(row, head): make(row) for row in range(driver.rows) for head in heads}

    def step(self, tokens: Tokens, padding: list[int]) -> dict[tuple[int, int], torch.Tensor]:
        """Feeds a step's tokens to every oracle.

        Returns:
            the outputs `[G, Q - padding, D]` by row and key/value head, with G query heads each.
        """
        count, groups = tokens.q.shape[2], self.driver.heads // self.driver.kv_heads
        outputs = {}
        for (row, head), oracle in self.each.items():
            pad, mine = padding[row], slice(head * groups, (head + 1) * groups)
            columns = list(range(self.seen + pad, self.seen + count))
            q, k, v = (
                tokens.q[row, mine, pad:],
                tokens.k[row, head, pad:],
                tokens.v[row, head, pad:],
            )
            window = self.driver.window
            visible = None if window is None else (lambda a, b, w=window: b > a - w)
            out = oracle.step(columns, q.numpy(), k.numpy(), v.numpy(), 8**-0.5, visible)
            outputs[row, head] = torch.from_numpy(out)
        self.seen += count
        return outputs


def check_each_step(driver: Driver, oracles: Oracles, steps: list[int], padding: list[int]) -> None:
    """Expects, after every step, the same outputs and kept sets, and scores of oracles with some.

    Args:
        driver: with the policy.
        oracles: fed the same tokens; see `Oracle`.
        steps: the tokens of each forward.
        padding: of each row, how many of the first tokens are padding.

    Raises:
        AssertionError: which step, row and head differ, and how.
    """
    groups = driver.heads // driver.kv_heads
    for number, count in enumerate(steps):
        here = [min(p, count) for p in padding]
        padding = [p - h for p, h in zip(padding, here, strict=True)]
        tokens = driver.tokens(count)
        outputs = driver.step(tokens, here)
        expected = oracles.step(tokens, here)
        for (row, head), oracle in oracles.each.items():
            where = f"step {number} of {count} tokens, row {row}, head {head}"
            mine = outputs[row, here[row] :, head * groups : (head + 1) * groups].transpose(0, 1)
            torch.testing.assert_close(
                mine, expected[row, head], rtol=1e-11, atol=1e-12,
                msg=partial("{}: outputs: {}".format, where),
            )  # fmt: skip
            kept, wanted = driver.kept(row, head), list(oracle.kept)
            if kept != wanted:
                raise AssertionError(f"{where}: expected the columns {wanted} to stay, got {kept}")
            scores = oracle.scores
            if scores is not None and Attention() in driver.cache.layers[0].parts:
                _check_scores(where, driver.statistic(row, head), scores)


def _check_scores(where: str, got: dict[int, float], expected: Mapping[int, float]) -> None:
    if got.keys() != expected.keys():
        raise AssertionError(
            f"{where}: expected scores of the columns {sorted(got)}, got some of {sorted(expected)}"
        )
    for column, score in expected.items():
        if not abs(got[column] - score) <= max(1e-10 * abs(score), 1e-12):
            raise AssertionError(
                f"{where}: expected column {column} to have received {score}, got {got[column]}"
            )
