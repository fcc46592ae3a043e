"""Reading a prefix into a cache, for use later: by `generate`, by copies, by questions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..cache.binding import attached
from ..cache.composed import ComposedCache
from ..cache.second_reading import second_reading, second_readings
from ..errors import KVPruneError
from ..models.releases import generate_cache_name
from ..models.structure import has_several_positions, takes, unwrapped
from .repeats import check_repeats, read_again, repeats_of

_OURS = {"past_key_values", "cache_position", "logits_to_keep", "use_cache", "return_dict"}


@torch.no_grad()
def read(
    model: Any,
    cache: ComposedCache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    chunk: int | None = None,
    **inputs: Any,
) -> Tensor:
    """Reads tokens as one prompt: all that policies want done at its end is done behind it.

        logits = kvprune.read(model, cache, document)
        for question in questions:
            ids = torch.cat([document, question], 1)
            model.generate(ids, cache=copy.deepcopy(cache), max_new_tokens=64)

    `generate` wants new tokens behind what was read; where there are none, the first is chosen from
    the logits: `ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)`.

    A policy that goes by a second reading, as KVzip, has the new tokens read again, chunk by chunk,
    before policies are asked at the prompt's end.

    Args:
        model: an attached model with a language-model head.
        cache: the cache, empty or not.
        input_ids: `[B, n]`, the new tokens, n at least 1; rows are padded on the left.
        attention_mask: `[B, seen + n]`, 0 for padding, what was read before included; None where
            nothing is padding.
        chunk: how many tokens are read in one forward; None for all.
        inputs: what else the model's forward takes, as pictures; not together with `chunk`.

    Returns:
        the logits behind the last token, `[B, V]`.

    Raises:
        KVPruneError: the model is not attached or has no head, there is no cache of ours, no
            tokens, padding behind a row's tokens, a mask of another size or a chunk below 1;
            `inputs` that cannot be cut into chunks, or together with a second reading; a second
            reading that is longer than the model's context.
    """
    _, base = attached(model, "read")
    inner: Any = unwrapped(model)
    if not takes(inner, "logits_to_keep"):
        raise KVPruneError(
            f"read: {type(model).__name__} gives no logits of tokens: expected a model with a "
            f"language-model head, as AutoModelForCausalLM gives one"
        )
    rows, count = _check(cache, input_ids, attention_mask, chunk, inputs)
    again = second_readings(cache)
    if cache.seen and inputs and has_several_positions(base):
        raise KVPruneError(
            f"read: {', '.join(inputs)} behind {cache.seen} tokens on {type(model).__name__}, "
            f"where tokens of pictures have several positions each: expected them with the first "
            f"tokens. Hand them in together, or to generate"
        )
    cache.guard.check_usable()
    valid = None if attention_mask is None else attention_mask[:, cache.seen :].bool()
    repeats = [(part, repeats_of(part, input_ids, valid)) for part in again]
    check_repeats(model, base, cache, attention_mask, count, repeats, inputs)
    before, size = cache.seen, chunk or count
    given: dict[str, Any] = {**inputs, "return_dict": True}
    lengths, masked = torch.full((rows,), count), {}
    if valid is not None:
        lengths = valid.sum(-1)
        masked = {"attention_mask": attention_mask}
    positions = None
    if takes(inner, "position_ids") and "position_ids" not in inputs:
        known = {**inputs, **masked, generate_cache_name(): cache}
        positions = inner._prepare_position_ids_for_generation(input_ids, known)
    lengths = lengths.to(input_ids.device)
    cache.announce_prompt(lengths, before + count, read_again=bool(again))
    # An error anywhere leaves policies that were not asked.
    with second_reading(cache) if again else nullcontext() as tell, _announced(cache):
        for start in range(before, before + count, size):
            stop = min(start + size, before + count)
            if attention_mask is not None:
                given["attention_mask"] = attention_mask[:, :stop]
            if positions is not None:
                given["position_ids"] = positions[..., start:stop]
            piece = input_ids[:, start - before : stop - before]
            output = model(piece, past_key_values=cache, logits_to_keep=1, **given)
        if tell is not None:
            read_again(model, cache, repeats, before, attention_mask, tell)
    logits: Tensor = output.logits[:, -1]
    return logits


@contextmanager
def _announced(cache: ComposedCache) -> Iterator[None]:
    """Within it, an announced prompt."""
    try:
        yield
    finally:
        cache.session.announce(0, 0, None)


def _check(cache: Any, ids: Any, mask: Any, chunk: Any, inputs: dict[str, Any]) -> tuple[int, int]:
    """The numbers of rows and of new tokens; refuses what cannot be read."""
    if not isinstance(cache, ComposedCache):
        raise KVPruneError(f"read: expected a ComposedCache, got {type(cache).__name__}")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.shape[1]:
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise KVPruneError(f"read: expected input_ids [B, n] of at least one token, got {got}")
    rows, count = ids.shape
    if cache.session.in_generate or cache.session.prompt_end:
        raise KVPruneError(
            "read: expected a cache that reads nothing else, got one inside generate or "
            "cache.prompt(...)"
        )
    if chunk is not None and (type(chunk) is not int or chunk < 1):
        raise KVPruneError(f"read: chunk={chunk!r}: expected a number of tokens, at least 1")
    ours = sorted(_OURS & inputs.keys())
    if ours:
        raise KVPruneError(f"read: {', '.join(ours)}: expected none, as read itself says these")
    if chunk is not None and inputs:
        raise KVPruneError(
            f"read: chunk={chunk} with {', '.join(inputs)}: expected one of both, since nobody "
            f"knows to which tokens of a chunk these belong"
        )
    if mask is None:
        return rows, count
    size = cache.seen + count
    if not isinstance(mask, Tensor) or mask.shape != (rows, size):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise KVPruneError(
            f"read: expected an attention_mask [{rows}, {size}], for the {cache.seen} tokens read "
            f"before and the {count} new ones, got {got}"
        )
    ends = mask[:, -1] == 0
    if bool(ends.any()):
        raise KVPruneError(
            f"read: expected padding before a row's tokens, got some behind those of rows "
            f"{ends.nonzero().flatten().tolist()}: pad on the left (padding_side='left')"
        )
    return rows, count
