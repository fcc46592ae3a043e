"""A prompt read in two forwards: its lead, which is all but its last token, then that token.

In one forward the last token would see all others before anything is evicted, so that an answer's
first token, often the only one, would not depend on the budget at all. So the lead is what a cache
is told to be the prompt: policies that evict at a prompt's end do so behind the lead, and a share
of the prompt is one of the lead's tokens. The last token is then read as decoding reads tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...cache.composed import ComposedCache
from ...models.structure import base_of, takes, unwrapped


def longest_of(model: Any) -> int:
    """The tokens that a model was made for; 0 where it does not say."""
    config = base_of(unwrapped(model)).config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", 0) or 0


def read_prompt(
    model: Any,
    cache: ComposedCache,
    tokens: Tensor,
    mask: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Reads prompts, padded on the left: all but their last tokens, then these.

    Args:
        model: attached.
        cache: an empty one.
        tokens: `[B, S]`, S at least 1.
        mask: `[B, S]`, 1 for tokens; None if nothing is padding.
        lengths: B, in tokens: what a budget given as a share is a share of; those of the prompts'
            leads where None.

    Returns:
        the logits behind the last tokens, `[B, V]`.

    Raises:
        KVPruneError: a policy cannot work on the model.
    """
    read_lead(model, cache, tokens, mask, lengths)
    return read_last(model, cache, tokens, mask, lengths)


def read_lead(
    model: Any,
    cache: ComposedCache,
    tokens: Tensor,
    mask: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> None:
    """The first half of `read_prompt`: all but the last tokens, if there are any."""
    if tokens.shape[1] > 1:
        lead = tokens[:, :-1]
        with _as_prompt(cache, lead, None if mask is None else mask[:, :-1], lengths):
            forward(model, lead, cache, mask)


def read_last(
    model: Any,
    cache: ComposedCache,
    tokens: Tensor,
    mask: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """The second half: the last tokens, by themselves."""
    last = tokens[:, -1:]
    if cache.seen:
        return forward(model, last, cache, mask)[:, -1]
    # A prompt of one token has no lead: the token is all there is to be a prompt.
    with _as_prompt(cache, last, mask, lengths):
        return forward(model, last, cache, mask)[:, -1]


@contextmanager
def _as_prompt(
    cache: ComposedCache, tokens: Tensor, mask: Tensor | None, lengths: Sequence[int] | None
) -> Iterator[None]:
    """While open, these tokens `[B, n]` are read as the whole prompt, even if they are one."""
    count = torch.full_like(tokens[:, 0], tokens.shape[1])
    if lengths is not None:
        count = torch.tensor(lengths, device=tokens.device)
    elif mask is not None:
        # At least 1: a row of one token beside longer ones has a prompt of one, as it has alone.
        count = mask.sum(-1).clamp(min=1)
    # Outside `generate` a single token would not count as a prompt.
    cache.enter_generate()
    try:
        cache.announce_prompt(count, tokens.shape[1])
        yield
    finally:
        cache.leave_generate()


@torch.no_grad()
def forward(
    model: Any, tokens: Tensor, cache: ComposedCache, mask: Tensor | None = None, asked: int = 1
) -> Tensor:
    """The logits `[B, asked, V]` of the last tokens; behind `mask` nothing is padding."""
    given: dict[str, Any] = {}
    if mask is not None:
        columns = cache.seen + tokens.shape[1]
        mask = pad(mask, (0, max(columns - mask.shape[1], 0)), value=1)[:, :columns]
        given["attention_mask"] = mask
        if takes(base_of(unwrapped(model)), "position_ids"):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            given["position_ids"] = positions[:, cache.seen :]
    output = model(tokens, past_key_values=cache, logits_to_keep=asked, **given)
    logits: Tensor = output.logits
    return logits
