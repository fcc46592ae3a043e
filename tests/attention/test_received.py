"""What slots receive, from queries, keys and log-sum-exp, against the n x n softmax."""

from __future__ import annotations

import pytest
import torch

from kvprune.attention import received as in_torch

from ..support.opcount import OpCount
from ..support.received_cases import CASES, case


@pytest.mark.parametrize("scores", [1, 3000, 1 << 24])
@pytest.mark.parametrize("name", CASES)
def test_the_blocks_equal_the_whole_softmax(name, scores, monkeypatch):
    """Blocks of one query, of a few and of all."""
    monkeypatch.setattr(in_torch, "SCORES", scores)
    this = case(**CASES[name])
    lse, received = this.naive()
    mine = in_torch.log_sum_exp(*this.arguments())
    torch.testing.assert_close(mine, lse, rtol=1e-12, atol=1e-12)
    got = in_torch.attention_received(*this.with_lse(mine))
    torch.testing.assert_close(got, received, rtol=1e-11, atol=1e-12)
    assert not got[(this.slot_columns < 0).expand_as(got)].any()


def test_every_valid_query_of_every_query_head_gives_one():
    """Padding gives nothing, whatever stands in its log-sum-exp."""
    this = case()
    lse = in_torch.log_sum_exp(*this.arguments())
    padding = (this.query_columns < 0)[:, None].expand_as(lse)
    assert (lse[padding] == -torch.inf).all() and lse[~padding].isfinite().all()
    for strange in (torch.nan, torch.inf, 0.0):
        got = in_torch.attention_received(*this.with_lse(lse.masked_fill(padding, strange)))
        torch.testing.assert_close(got.sum(-1), torch.tensor([[140.0] * 2, [112.0] * 2]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_loses_nothing_but_what_its_inputs_lost(dtype):
    """Scores are float32, as those of the kernels that the log-sum-exp comes from."""
    this = case(softcap=20.0).to(dtype)
    lse, received = this.naive()
    mine = in_torch.log_sum_exp(*this.arguments())
    got = in_torch.attention_received(*this.with_lse(mine))
    assert mine.dtype == got.dtype == torch.float32
    torch.testing.assert_close(mine, lse.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, received.float(), rtol=1e-5, atol=1e-5)


def test_an_attention_sink_s_share_goes_to_no_slot():
    """The log-sum-exp may cover more than the slots."""
    this = case()
    lse = in_torch.log_sum_exp(*this.arguments())
    half = in_torch.attention_received(*this.with_lse(lse + torch.log(torch.tensor(2.0))))
    whole = in_torch.attention_received(*this.with_lse(lse))
    torch.testing.assert_close(2 * half, whole, rtol=1e-6, atol=1e-6)


def test_no_gradient_and_nothing_n_by_n(monkeypatch):
    """The statistic is detached, and blocks hold what they may."""
    monkeypatch.setattr(in_torch, "SCORES", 1 << 14)
    this = case(old=200, new=500, size=8)
    this.key.requires_grad_()
    with OpCount() as ops:
        lse = in_torch.log_sum_exp(*this.arguments())
        got = in_torch.attention_received(*this.with_lse(lse))
    assert not lse.requires_grad and not got.requires_grad
    assert ops.big() <= 1 << 14
