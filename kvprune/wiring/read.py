"""Reading a prefix into a cache, for use later: by `generate`, by copies, by questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..cache.binding import attached
from ..cache.composed import ComposedCache
from ..cache.second_reading import second_reading, second_readings
from ..engine.second_reading import Repeat
from ..errors import KVPruneError
from ..models.releases import generate_cache_name
from ..models.structure import has_several_positions, takes, unwrapped
from ..policy.composition import leaves
from ..statistics import SecondReading

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
    repeats = [(part, _repeats(part, input_ids, valid)) for part in again]
    _check_repeats(model, base, cache, attention_mask, count, repeats, inputs)
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
            _read_again(model, cache, repeats, before, attention_mask, tell)
    logits: Tensor = output.logits[:, -1]
    return logits


@contextmanager
def _announced(cache: ComposedCache) -> Iterator[None]:
    """Within it, an announced prompt."""
    try:
        yield
    finally:
        cache.session.announce(0, 0, None)


Repeats = Sequence[Sequence[tuple[list[int], int, int]]]
"""By row, what is read a second time: tokens, and the columns at which their chunk begins and ends.

Columns count from the first of the new tokens.
"""


def _repeats(part: SecondReading, ids: Tensor, valid: Tensor | None) -> Repeats:
    """What a statistic wants read a second time of ids `[B, n]`, of which some are padding."""
    found = []
    for row, tokens in enumerate(ids.tolist()):
        columns = list(range(len(tokens)))
        if valid is not None:
            columns = [column for column, here in enumerate(valid[row].tolist()) if here]
        chunks = part.repeats([tokens[column] for column in columns])
        for read, start, stop in chunks:
            if not read or not 0 <= start < stop <= len(columns):
                raise KVPruneError(
                    f"read: {part!r}: repeats() gave {len(read)} tokens for a chunk from {start} "
                    f"to {stop}: expected at least one token, and a chunk within the "
                    f"{len(columns)} tokens of its row"
                )
        found.append([(read, columns[a], columns[b - 1] + 1) for read, a, b in chunks])
    return found


def _read_again(
    model: Any,
    cache: ComposedCache,
    repeats: Sequence[tuple[SecondReading, Repeats]],
    before: int,
    mask: Tensor | None,
    tell: Callable[[Repeat], None],
) -> None:
    """Reads new tokens a second time, a chunk of each row in one forward.

    Args:
        model: an attached model.
        cache: what has read them.
        repeats: what is read, for each statistic.
        before: columns shown before them.
        mask: `[B, seen]`; None where nothing is padding.
        tell: is told what each forward repeats.
    """
    inner: Any = unwrapped(model)
    device = next(model.parameters()).device if mask is None else mask.device
    for part, by_row in repeats:
        for each in zip_longest(*by_row, fillvalue=([], 0, 0)):
            size = max(len(tokens) for tokens, _, _ in each)
            # Right behind a row's context, as windows slide by columns; then padding.
            ids = [tokens + [0] * (size - len(tokens)) for tokens, _, _ in each]
            here = [[1] * len(tokens) + [0] * (size - len(tokens)) for tokens, _, _ in each]
            read = torch.tensor(ids, device=device)
            seen = torch.ones(len(ids), cache.seen, device=device) if mask is None else mask
            whole = torch.cat([seen.long(), torch.tensor(here, device=device)], 1)
            given: dict[str, Any] = {"return_dict": True}
            if takes(inner, "position_ids"):
                known = {"attention_mask": whole, generate_cache_name(): cache}
                positions = inner._prepare_position_ids_for_generation(read, known)
                given["position_ids"] = positions[..., -size:]
            if not bool(whole.all()):
                given["attention_mask"] = whole
            start, stop = (
                torch.tensor([chunk[edge] for chunk in each], device=device) + before
                for edge in (1, 2)
            )
            tell(Repeat(part, start, stop, cache.seen))
            model(read, past_key_values=cache, logits_to_keep=1, **given)


def _check_repeats(
    model: Any,
    base: Any,
    cache: ComposedCache,
    mask: Tensor | None,
    count: int,
    repeats: Sequence[tuple[SecondReading, Repeats]],
    inputs: dict[str, Any],
) -> None:
    """Refuses a second reading that the model cannot follow."""
    if not repeats:
        return
    if inputs:
        raise KVPruneError(
            f"read: {', '.join(inputs)} with {repeats[0][0]!r}: expected token ids and a mask "
            f"alone, since the forwards of a second reading know no others"
        )
    words = model.get_input_embeddings().weight.shape[0]
    config = base.config.get_text_config(decoder=True)
    # Positions inside the cache never come to an end.
    longest = getattr(config, "max_position_embeddings", 0) or 0
    inside = any(policy.positions_in_cache for policy in leaves(cache.policies))
    most = 0 if inside else longest
    for part, by_row in repeats:
        for row, chunks in enumerate(by_row):
            read = cache.seen + count if mask is None else int(mask[row].sum())
            size = max((len(tokens) for tokens, _, _ in chunks), default=0)
            if most and read + size > most:
                raise KVPruneError(
                    f"read: {part!r} reads {size} tokens a second time behind {read} in row {row}: "
                    f"expected at most {most} together, the context of {type(base).__name__}. Use "
                    f"a smaller chunk, or a shorter prompt"
                )
            wrong = [i for tokens, _, _ in chunks for i in tokens if not 0 <= i < words]
            if wrong:
                raise KVPruneError(
                    f"read: {part!r} asks with token {wrong[0]}: expected ids below {words}, those "
                    f"of {type(model).__name__}. Take first, later and reply from its tokenizer"
                )


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
