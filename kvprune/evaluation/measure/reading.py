"""A prompt read in two forwards: its lead, which is all but its last token, then that token.

In a single forward the last token would see all other tokens before anything is evicted. An
answer's first token, often the only one, would then not depend on the budget at all. So the cache
is told that the lead is the prompt: policies that evict at a prompt's end do so behind the lead,
and a share of the prompt is a share of the lead's tokens. The last token is then read as decoding
reads tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...cache.composed import ComposedCache
from ...cache.second_reading import second_readings
from ...models.structure import base_of, takes, unwrapped
from ...wiring.read import read


def longest_of(model: Any) -> int:
    """The number of tokens that a model was made for; 0 if its config does not say."""
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
        model: an attached model.
        cache: an empty cache.
        tokens: `[B, S]`, S at least 1.
        mask: `[B, S]`, 1 for tokens; None if nothing is padding.
        lengths: B numbers of tokens, of which a budget given as a share is a share; None for the
            lengths of the prompts' leads.

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
    """Does the first half of `read_prompt`: reads all but the last tokens, if there are any."""
    if tokens.shape[1] > 1:
        lead = tokens[:, :-1]
        if second_readings(cache):
            read(model, cache, lead, None if mask is None else mask[:, :-1])
            return
        with _as_prompt(cache, lead, None if mask is None else mask[:, :-1], lengths):
            forward(model, lead, cache, mask)


def read_last(
    model: Any,
    cache: ComposedCache,
    tokens: Tensor,
    mask: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Does the second half of `read_prompt`: reads the last tokens, by themselves.

    Returns:
        the logits behind the last tokens, `[B, V]`.
    """
    last = tokens[:, -1:]
    if cache.seen:
        return forward(model, last, cache, mask)[:, -1]
    # A prompt of one token has no lead: the token itself is then the prompt.
    if second_readings(cache):
        return read(model, cache, last, mask)
    with _as_prompt(cache, last, mask, lengths):
        return forward(model, last, cache, mask)[:, -1]


@contextmanager
def _as_prompt(
    cache: ComposedCache, tokens: Tensor, mask: Tensor | None, lengths: Sequence[int] | None
) -> Iterator[None]:
    """Inside the context the tokens `[B, n]` are read as the whole prompt, even if n is 1."""
    count = torch.full_like(tokens[:, 0], tokens.shape[1])
    if lengths is not None:
        count = torch.tensor(lengths, device=tokens.device)
    elif mask is not None:
        # At least 1: a row of one token has a prompt of one token beside longer rows, as it has
        # alone.
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
    """The logits `[B, asked, V]` of the last `asked` tokens; behind `mask` nothing is padding."""
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
