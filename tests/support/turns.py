"""Several turns of a padded batch: what the CPU's code says, and what another way has to say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvprune
from kvprune.policies import H2O, SDTP, SDTPHeads, StreamingLLM

from .models import left_padded, prompt, tiny_model
from .strategies import sdtp_heads

POLICIES: dict[str, Any] = {
    "dense": list,
    "StreamingLLM": lambda: [StreamingLLM(2, 9)],
    "H2O": lambda: [H2O(4, 7)],
    "SDTP": lambda: [SDTP(sdtp_heads(), 0.7, min_tokens=6)],
    "SDTP + H2O": lambda: [SDTP(sdtp_heads(), 0.7, min_tokens=6), H2O(4, 7)],
}
STEPS = [40, 1, 1, 12, 1, 1]


def on_the_cpu(family: str, policies: list[Any], *more: Any, **options: Any) -> Any:
    """What `follow` gives without any of this."""
    with pytest.MonkeyPatch.context() as here:
        here.setattr("kvprune.attention.received.on_gpu", lambda tensor: False)
        return follow(tiny_model(family, **options), policies, *more)


def follow(model: Any, policies: list[Any], steps: list[int], padding: list[int]) -> Any:
    """Logits of every valid token, on the CPU, and the cache, after some forwards."""
    for policy in policies:
        if isinstance(policy, SDTP) and isinstance(policy.heads, SDTPHeads):
            policy.heads.to(model.device)
    ids = prompt(2, sum(steps))
    mask = left_padded(ids, padding)["attention_mask"]
    cache, start, logits = kvprune.ComposedCache(policies), 0, []
    for count in steps:
        new, start = slice(start, start + count), start + count
        tokens, now = (t.to(model.device) for t in (ids[:, new], mask[:, :start]))
        with torch.no_grad():
            out = model(tokens, attention_mask=now, past_key_values=cache)
        logits.append(out.logits.cpu()[mask[:, new].bool()])
    return torch.cat(logits), cache


def assert_same(got: Any, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=rtol, atol=rtol / 10)
    for mine, theirs in zip(got[1].layers, expected[1].layers, strict=True):
        assert torch.equal(mine.columns, theirs.columns)
        for name, value in mine.statistics.items():
            there = theirs.columns.expand_as(value) >= 0
            torch.testing.assert_close(
                value[there], theirs.statistics[name][there], rtol=rtol, atol=rtol
            )
