"""A prompt read a second time: what is repeated, and the forwards that do it; see `read.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..cache.composed import ComposedCache
from ..engine.second_reading import Repeat
from ..errors import KVPruneError
from ..models.releases import generate_cache_name
from ..models.structure import takes, unwrapped
from ..policy.composition import leaves
from ..statistics import SecondReading

Repeats = Sequence[Sequence[tuple[list[int], int, int]]]
"""By row, what is read a second time: tokens, and the columns at which their chunk begins and ends.

Columns count from the first of the new tokens.
"""


def repeats_of(part: SecondReading, ids: Tensor, valid: Tensor | None) -> Repeats:
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


def read_again(
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
    assert cache.state.rows is not None
    device = cache.state.rows.first.device
    mask = None if mask is None else mask.to(device)
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


def check_repeats(
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
