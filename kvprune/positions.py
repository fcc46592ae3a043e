"""Positions inside the cache, for streams past the trained context (arXiv 2309.17453, 3.2).

A token's position is its place among the slots that are left, not in the text. RoPE sees
distances alone, so the window keeps the positions at which its keys were turned, new tokens
count on behind it, and only the few sinks are turned anew in each step, to sit right before
it: always from the keys as they first came, so that no error adds up. Every so often, when
positions have run further than a layer has slots, all is anchored anew: the keys of the window
are turned back together, and numbers stay small and exact however long the stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .composition import leaves
from .devices import Copies, device_of
from .errors import KVPruneError
from .families import has_alibi
from .policy import TokenPolicy
from .slots import SlotLayer

PROBED = (3, 8)
"""Two positions at which a model shows how it turns its keys."""

_BY_LAYER = ("home", "turn", "gap")
_FAR = torch.iinfo(torch.int64).max // 2


@dataclass(frozen=True)
class Rotation:
    """How one layer turns keys by their position.

    frequencies: `[R / 2]` float64, radians per position. start: the first of the R turned
    dimensions. interleaved: dimension 2i turns with 2i + 1, and not i with i + R / 2.
    """

    frequencies: Tensor
    start: int
    interleaved: bool

    def turned(self, keys: Tensor, by: Tensor) -> Tensor:
        """Keys `[B, H, S, D]` moved on by `by` `[B]` positions; computed in float32 at least."""
        size = 2 * len(self.frequencies)
        angles = by.double()[:, None, None, None] * self.frequencies.to(keys.device)
        wide = torch.promote_types(keys.dtype, torch.float32)
        cosine, sine = angles.cos().to(wide), angles.sin().to(wide)
        part = keys[..., self.start : self.start + size].to(wide)
        a, b = (part[..., ::2], part[..., 1::2]) if self.interleaved else part.chunk(2, -1)
        pair = (a * cosine - b * sine, b * cosine + a * sine)
        moved = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        before, behind = keys[..., : self.start], keys[..., self.start + size :]
        return torch.cat([before, moved.to(keys.dtype), behind], -1)

    def explains(self, here: Tensor, there: Tensor, by: Tensor, near: float) -> bool:
        """Whether `there` is `here` moved on, up to `near` of each pair's length."""
        size = 2 * len(self.frequencies)
        scale = here.abs().double()
        part = scale[..., self.start : self.start + size]
        a, b = (part[..., ::2], part[..., 1::2]) if self.interleaved else part.chunk(2, -1)
        length = a + b
        both = (length, length)
        wide = torch.stack(both, -1).flatten(-2) if self.interleaved else torch.cat(both, -1)
        scale = torch.cat([scale[..., : self.start], wide, scale[..., self.start + size :]], -1)
        return bool(((self.turned(here, by) - there).abs() <= near * scale).all())


def rotations_of(base: Any) -> list[Rotation | None]:
    """How each layer of a model turns its keys; None for one that does not (NoPE, ALiBi).

    Found by trial: a token alone in its sequence has the same hidden states wherever it
    stands, so that its keys at two positions differ by their rotation and by nothing else.

    Raises:
        KVPruneError: some layer does something else with positions.
    """
    if has_alibi(base):
        return [None] * base.config.num_hidden_layers
    keys = _probe(base)
    names = [n for n, _ in base.named_buffers() if n.endswith("inv_freq") and "original" not in n]
    found = [base.get_buffer(name).double() for name in names]
    rotations = [_rotation_of(base, layer, found) for layer in keys]
    if not any(rotations):
        raise _no_positions(base)
    return rotations


@torch.no_grad()
def _probe(base: Any) -> list[Tensor]:
    """Each layer's keys of one token at two positions, `[2, H, 1, D]`."""
    weight = base.get_input_embeddings().weight
    token = torch.randn(weight.shape[-1], generator=torch.Generator().manual_seed(0))
    device = device_of(base.get_input_embeddings())
    token = token.to(device, weight.dtype).expand(2, 1, -1)
    cache: Any = DynamicCache(config=base.config)
    where = torch.tensor(PROBED, device=device)[:, None]
    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        base(inputs_embeds=token, position_ids=where, past_key_values=cache, use_cache=True)
    finally:
        for module in training:
            module.training = True
    if not all(hasattr(layer, "keys") for layer in cache.layers):
        raise _no_positions(base)
    return [layer.keys for layer in cache.layers]


def _rotation_of(base: Any, keys: Tensor, found: list[Tensor]) -> Rotation | None:
    here, there = keys[:1], keys[1:]
    by = torch.tensor([PROBED[1] - PROBED[0]], device=keys.device)
    # Models compute angles in float32 at best.
    near = 8 * torch.finfo(keys.dtype).eps + 1e-5
    # Number by number: a large one (a bias) must not hide that others turn.
    if bool(((here - there).abs() <= near * here.abs()).all()):
        return None
    for frequencies in (each.to(keys.device) for each in found):
        size = 2 * len(frequencies)
        for start in dict.fromkeys((0, keys.shape[-1] - size)):
            for interleaved in (False, True):
                guess = Rotation(frequencies, start, interleaved)
                if start >= 0 and guess.explains(here, there, by, near):
                    return guess
    raise _no_positions(base)


def _no_positions(base: Any) -> KVPruneError:
    return KVPruneError(
        f"positions inside the cache with {type(base).__name__}: its keys are not turned by "
        f"their position as RoPE does, so they cannot be moved. Expected a model with "
        f"RoPE, or BLOOM; use positions='original' with this one"
    )


@dataclass(frozen=True)
class _Placement:
    """Where a layer's sinks are, all `[B, 1, sinks]`.

    index: their slots. there: whether they are in one. arrived: which have just come in; None
    for none, as in almost every step.
    """

    index: Tensor
    there: Tensor
    arrived: Tensor | None


class CachePositions:
    """The positions of one cache's rows, and the keys of their sinks as they first came.

    A token's *number* counts its row's valid tokens from 0; its position lags behind that by
    an offset, which grows with what is evicted.

    Args:
        sinks: how many of a row's first tokens sit right before the oldest of the others.
        rotations: by layer; see `rotations_of`.
        limit: the position from which on the model changes its frequencies; None if never.
    """

    def __init__(self, sinks: int, rotations: list[Rotation | None], limit: int | None) -> None:
        self.sinks, self.limit = sinks, limit
        self._rotations = rotations
        self._offset: Tensor | None = None
        self._copies = Copies()
        # By layer: keys `[B, Hkv, sinks, D]`, and by how much those in the slots are turned.
        self._home: list[Tensor | None] = [None] * len(rotations)
        self._turn: list[Tensor | None] = [None] * len(rotations)
        # By layer `[B]`: the gap that pruning left behind the sinks, -1 as long as nothing is
        # behind them.
        self._gap: list[Tensor | None] = [None] * len(rotations)
        self._last: tuple[Tensor, Tensor, _Placement] | None = None

    def named_tensors(self) -> dict[str, Tensor]:
        """All that is held, by name."""
        held: dict[str, Tensor | None] = {"offset": self._offset}
        for kind in _BY_LAYER:
            held |= {f"{kind}.{i}": tensor for i, tensor in enumerate(getattr(self, f"_{kind}"))}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def restore(
        self, tensors: Mapping[str, Tensor], prefix: str, devices: Sequence[torch.device]
    ) -> None:
        """Takes over what `named_tensors` gave.

        Args:
            tensors, prefix: each name behind `prefix`.
            devices: by layer, where it is.
        """
        # It goes to where the tokens are in the next step.
        self._set_offset(tensors.get(f"{prefix}offset"))
        for kind in _BY_LAYER:
            found = (
                _moved(tensors.get(f"{prefix}{kind}.{i}"), device)
                for i, device in enumerate(devices)
            )
            setattr(self, f"_{kind}", list(found))

    def _set_offset(self, offset: Tensor | None) -> None:
        self._offset, self._copies = offset, Copies()

    def _offset_on(self, device: torch.device) -> Tensor | None:
        return None if self._offset is None else self._copies.on(self._offset, device)

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        self._set_offset(_selected(self._offset, rows))
        self._home = [_selected(home, rows) for home in self._home]
        self._turn = [_selected(turn, rows) for turn in self._turn]
        self._gap = [_selected(gap, rows) for gap in self._gap]

    def of_new(self, columns: Tensor, padding: Tensor | None) -> Tensor:
        """The positions `[B, Q]` of a forward's tokens, 0 for padding.

        Args:
            columns: `[B, Q]`, -1 for padding.
            padding: `[B, seen + Q]`; None for none.

        Raises:
            KVPruneError: they run to where the model changes its frequencies.
        """
        positions = _numbers(columns, padding)
        if self._offset is not None:
            positions = positions - self._offset[:, None]
        positions = positions.masked_fill(columns < 0, 0)
        if self.limit is not None and int(positions.max()) >= self.limit:
            raise KVPruneError(
                f"positions inside the cache reach {self.limit}, from where on this model changes "
                f"its frequencies: expected a smaller budget, and prompts that are read in chunks "
                f"(prefill_chunk_size)"
            )
        return positions

    def anchor(
        self, layers: list[SlotLayer], columns: Tensor, padding: Tensor | None, first: Tensor
    ) -> None:
        """Moves all positions back, once they have run further than there are slots.

        Args:
            layers: of the cache.
            columns, padding: see `of_new`.
            first: `[B]`, each row's first valid column.
        """
        offset = self._offset_on(first.device)
        if offset is None or offset is not self._offset:
            self._set_offset(torch.zeros_like(first) if offset is None else offset)
        if not any(self._rotations):
            return
        assert self._offset is not None
        held = max(layer.used for layer in layers)
        newest = (_numbers(columns, padding) - self._offset[:, None]).amax()
        if held == 0 or int(newest) <= 2 * held + columns.shape[1]:
            return
        each = enumerate(layers)
        lags = [self._lag(i, layer.columns, padding, first) for i, layer in each]
        shift = torch.stack([lag.to(first.device) for lag in lags]).amin(0)
        if not bool(shift.any()):
            return
        copies = Copies()
        for index, (layer, rotation) in enumerate(zip(layers, self._rotations, strict=True)):
            here = copies.on(shift, layer.columns.device)
            if rotation is not None:
                layer.rewrite_keys(rotation.turned(layer.keys, -here))
            # The sinks were moved along; the next token's arrival puts them in their place.
            turn = self._turn[index]
            self._turn[index] = (0 if turn is None else turn) - here
        self._set_offset(self._offset + shift)

    def _lag(self, index: int, columns: Tensor, padding: Tensor | None, first: Tensor) -> Tensor:
        """How far `[B]` a layer's window has moved on from its sinks as they first came."""
        offset, first = self._offset_on(columns.device), first.to(columns.device)
        assert offset is not None
        if not columns.shape[-1]:
            return torch.zeros_like(first)
        others = columns[:, 0] >= (first + self.sinks)[:, None]
        oldest = columns[:, 0].masked_fill(~others, _FAR).amin(-1, keepdim=True)
        alone = oldest[:, 0] == _FAR
        number = _numbers(oldest, _moved(padding, columns.device))[:, 0]
        lag = (number - offset - self.sinks).masked_fill(alone, 0).clamp(min=0)
        gap = self._gap[index]
        gap = torch.full_like(lag, -1) if gap is None else gap
        gap = torch.where((gap < 0) & ~alone, lag, gap)
        self._gap[index] = gap
        return (lag - gap.clamp(min=0)).clamp(min=0)

    def distance_closed(
        self, index: int, columns: Tensor, padding: Tensor | None, first: Tensor
    ) -> Tensor:
        """By how much `[B, 1, S]` each slot moves on, for a bias that goes by position (ALiBi).

        Args:
            index: the layer.
            columns: `[B, 1, S]`, of all slots that are attended to.
            padding, first: see `anchor`.
        """
        lag = self._lag(index, columns, padding, first)[:, None, None]
        sink = (columns >= 0) & (columns < (first + self.sinks)[:, None, None])
        return torch.where(sink, lag, torch.zeros_like(lag))

    def arrange(
        self,
        index: int,
        slots: SlotLayer,
        new: Tensor,
        padding: Tensor | None,
        first: Tensor,
    ) -> None:
        """Puts a layer's sinks in their place, once new tokens are stored.

        Args:
            index: the layer.
            slots: of it.
            new: `[B, 1, Q]` columns of the new tokens.
            padding: see `of_new`.
            first: `[B]`, each row's first valid column.
        """
        rotation = self._rotations[index]
        if rotation is None or self.sinks == 0:
            return
        placement = self._placement(slots.columns, new, first)
        self._take_home(index, slots, placement)
        turn, now = self._lag(index, slots.columns, padding, first), self._turn[index]
        if torch.equal(turn, torch.zeros_like(turn) if now is None else now):
            return
        home = self._home[index]
        assert home is not None
        slots.rewrite_keys(rotation.turned(home, turn), placement.index, placement.there)
        self._turn[index] = turn.clone()

    def _placement(self, columns: Tensor, new: Tensor, first: Tensor) -> _Placement:
        # Layers mostly hold the same columns in the same order.
        if self._last is not None and self._last[0] is new and torch.equal(self._last[1], columns):
            return self._last[2]
        wanted = first[:, None] + torch.arange(self.sinks, device=first.device)
        same = columns == wanted[..., None]
        arrived = (wanted[..., None] == new).any(-1)[:, None]
        placement = _Placement(
            index=same.byte().argmax(-1)[:, None],
            there=same.any(-1)[:, None],
            arrived=arrived if bool(arrived.any()) else None,
        )
        self._last = (new, columns, placement)
        return placement

    def _take_home(self, index: int, slots: SlotLayer, placement: _Placement) -> None:
        """Copies the keys of sinks that have just come in."""
        home, arrived = self._home[index], placement.arrived
        if home is not None and arrived is None:
            return
        keys = slots.keys
        place = placement.index[..., None].expand(-1, keys.shape[1], -1, keys.shape[-1])
        came = keys.gather(2, place)
        if home is not None and arrived is not None:
            came = torch.where(arrived[..., None], came, home)
        self._home[index] = came


def positions_for(
    policies: Sequence[TokenPolicy], base: Any, memory: dict[str, Any]
) -> CachePositions | None:
    """The positions that some policy wants assigned inside the cache; None if none does.

    Args:
        policies: a pipeline.
        base: the model.
        memory: of the model, where its rotations are kept.

    Raises:
        KVPruneError: policies that do not go together, or a model without RoPE.
    """
    asking = [p for p in leaves(policies) if p.sinks_before_window is not None]
    if not asking:
        return None
    sinks = asking[0].sinks_before_window
    evicting = [p for p in leaves(policies) if "rank_slots" in p.hooks]
    other = [p for p in evicting if p.sinks_before_window != sinks]
    if other:
        raise KVPruneError(
            f"{asking[0]!r} assigns positions inside the cache, which needs a window without "
            f"gaps: expected no other policy that evicts, came {other!r}. Use "
            f"positions='original' with them"
        )
    assert sinks is not None
    if "rotations" not in memory:
        memory["rotations"] = rotations_of(base)
    return CachePositions(sinks, memory["rotations"], _limit(base))


def _limit(base: Any) -> int | None:
    """The position from which on a model's RoPE changes its frequencies."""
    config = base.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind == "longrope":
        return int(rope["original_max_position_embeddings"])
    return int(config.max_position_embeddings) if kind == "dynamic" else None


def _numbers(columns: Tensor, padding: Tensor | None) -> Tensor:
    """How many valid tokens of its row come before each of `columns` `[B, n]`."""
    if padding is None:
        return columns
    before = padding.long().cumsum(-1)
    return columns - before.gather(-1, columns.clamp(0, padding.shape[1] - 1))


def _moved(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device)


def _selected(value: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if value is None else value.index_select(0, rows.to(value.device))
