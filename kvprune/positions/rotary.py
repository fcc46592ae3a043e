"""The rotation of a model's keys by their position (RoPE), and turning keys further.

Nothing here is of a sequence. Frequencies are the model's own, so that scaled RoPE of every
kind (linear, dynamic, YaRN, Llama 3) and RoPE of a part of each key come as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import KVPruneError
from ..models.devices import device_of, without_autocast
from ..models.families import has_alibi, linear_layers
from ..models.releases import CACHE_ARGUMENTS, with_cache
from ..models.structure import argument, decoder_layers, takes, with_argument

PROBED = (3, 8)
"""Two positions at which a model shows how it turns its keys."""


@dataclass(frozen=True)
class Rotation:
    """The rotation of one layer's keys by their position.

    frequencies: `[R / 2]` float64, radians per position.
    start: the first of the R turned dimensions.
    interleaved: dimension 2i turns with 2i + 1, and not i with i + R / 2.
    """

    frequencies: Tensor
    start: int
    interleaved: bool

    def angles(self, by: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[..., R / 2]` of so many positions `[...]`, for such keys.

        From float64 angles; in the keys' precision, float32 at least.
        """
        angles = by.double()[..., None] * self.frequencies.to(keys.device)
        wide = torch.promote_types(keys.dtype, torch.float32)
        return angles.cos().to(wide), angles.sin().to(wide)

    def turned(self, keys: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Keys `[B, H, S, D]` moved on by `angles` of `[B, 1|H, 1|S]` positions."""
        size = 2 * len(self.frequencies)
        part = keys[..., self.start : self.start + size].to(cosine.dtype)
        a, b = (part[..., ::2], part[..., 1::2]) if self.interleaved else part.chunk(2, -1)
        # In place where that is allowed: large tensors made anew cost more than the sums.
        pair = ((a * cosine).addcmul_(b, sine, value=-1), (b * cosine).addcmul_(a, sine))
        moved = [torch.stack(pair, -1).flatten(-2)] if self.interleaved else list(pair)
        before, behind = keys[..., : self.start], keys[..., self.start + size :]
        return torch.cat([before, *(part.to(keys.dtype) for part in moved), behind], -1)

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
        turned = self.turned(here, *self.angles(by[:, None, None], here))
        return bool(((turned - there).abs() <= near * scale).all())


@dataclass(frozen=True)
class _Purpose:
    """What rotations are wanted for, and what to do where they are not known."""

    name: str
    advice: str


_POSITIONS = _Purpose(
    "positions inside the cache",
    "Expected a model with RoPE, or BLOOM; use positions='original' with this one",
)
_QUERIES = _Purpose(
    "queries before rotation, which QueryMoments reads,",
    "Use a policy that reads no such queries, as SnapKV",
)

UNTURNED = Rotation(torch.zeros(0, dtype=torch.float64), 0, interleaved=False)
"""The rotation of a layer that turns nothing."""


def query_rotations(base: Any) -> list[Rotation]:
    """The rotation of each layer's queries; also of models whose positions are learned (GPT-2).

    Found by trial as in `rotations_of`, but with layers that are handed the same hidden states at
    both positions, so that only what a layer itself does with positions is seen.

    Raises:
        KVPruneError: some layer does something else with positions, as latent attention (MLA).
    """
    config = base.config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None):
        raise _unknown(base, _QUERIES, "it stores latent keys (MLA), unlike its queries")
    if has_alibi(base):
        return [UNTURNED] * config.num_hidden_layers
    found = _rotations(base, _QUERIES, alike=True)
    return [UNTURNED if rotation is None else rotation for rotation in found]


def rotations_of(base: Any) -> list[Rotation | None]:
    """The rotation of each layer of a model; None for one that turns no keys (NoPE, ALiBi).

    Found by trial: a token alone in its sequence has the same hidden states wherever it
    stands, so that its keys at two positions differ by their rotation and by nothing else.

    Raises:
        KVPruneError: some layer does something else with positions.
    """
    if has_alibi(base):
        return [None] * base.config.num_hidden_layers
    if any(linear_layers(base)):
        raise _unknown(base, _POSITIONS, "it has linear-attention layers, which keep no keys")
    rotations = _rotations(base, _POSITIONS, alike=False)
    if not any(rotations):
        raise _unknown(base, _POSITIONS, _UNEXPLAINED)
    return rotations


def _rotations(base: Any, purpose: _Purpose, alike: bool) -> list[Rotation | None]:
    """The rotation of each layer's keys; None for one that turns nothing, or has no keys.

    Args:
        base: the model.
        purpose: what for.
        alike: see `_probe`.
    """
    keys = _probe(base, alike)
    # Behind the trial, which puts back what a long forward has stretched.
    names = [n for n, _ in base.named_buffers() if n.endswith("inv_freq") and "original" not in n]
    found = [base.get_buffer(name).double() for name in names]
    # A decoder out of an encoder-decoder model has a cache for each layer of the encoder.
    layers = keys[: len(decoder_layers(base))]
    # What is compared stays in the dtype of the keys.
    with without_autocast(device_of(base)):
        return [None if k is None else _rotation_of(base, k, found, purpose) for k in layers]


@torch.no_grad()
def _probe(base: Any, alike: bool) -> list[Any]:
    """Each layer's keys of one token at two positions, `[2, H, 1, D]`; None for a linear layer.

    Args:
        base: the model.
        alike: whether each layer is handed the same hidden states at both.
    """
    device = device_of(base.get_input_embeddings())
    token = _token(base, device)
    cache: Any = DynamicCache(config=base.config)
    where = torch.tensor(PROBED, device=device)[:, None]
    training = [module for module in base.modules() if module.training]
    hooks = [
        layer.register_forward_pre_hook(partial(_made_finite, cache, alike), with_kwargs=True)
        for layer in decoder_layers(base)
    ]
    base.eval()
    try:
        with without_autocast(device):
            base(**token, position_ids=where, use_cache=True, **with_cache(base, cache))
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return [getattr(layer, "keys", None) for layer in cache.layers]


def _token(base: Any, device: torch.device) -> dict[str, Tensor]:
    """The same token in two rows, as the model's forward is handed it: any will do."""
    embeddings = base.get_input_embeddings()
    if takes(base, "per_layer_inputs"):
        # What such a model knows of a token in each layer goes by its id. Padding may be all zero.
        known = 2 if embeddings.padding_idx == 1 else 1
        return {"input_ids": torch.full((2, 1), known, device=device)}
    weight = embeddings.weight
    token = torch.randn(weight.shape[-1], generator=torch.Generator().manual_seed(0))
    return {"inputs_embeds": token.to(device, weight.dtype).expand(2, 1, -1)}


def _made_finite(
    cache: Any, alike: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hands a layer other numbers where those of the layer before have overflown, as in float16.

    The same ones at both positions; `alike`, those of the first at both, whatever they are. In the
    trial's own forward alone: others may run meanwhile.
    """
    hidden = argument(layer, args, kwargs, "hidden_states")
    mine = any(argument(layer, args, kwargs, name) is cache for name in CACHE_ARGUMENTS)
    if not mine or (bool(hidden.isfinite().all()) and not alike):
        return None
    if bool(hidden.isfinite().all()):
        same = hidden[:1].expand_as(hidden)
        return with_argument(layer, args, kwargs, "hidden_states", same)
    numbers = torch.randn(hidden.shape[1:], generator=torch.Generator().manual_seed(0))
    return with_argument(layer, args, kwargs, "hidden_states", numbers.to(hidden).expand_as(hidden))


def _rotation_of(
    base: Any, keys: Tensor, found: list[Tensor], purpose: _Purpose
) -> Rotation | None:
    if not bool(keys.isfinite().all()):
        raise KVPruneError(
            f"{purpose.name} with {type(base).__name__}: a layer's keys are not finite (NaN or "
            f"infinite), whatever it is handed, so that nobody can tell how it turns them. "
            f"Expected finite weights, and a dtype in which they do not overflow: bfloat16 or "
            f"float32"
        )
    here, there = keys[:1], keys[1:]
    by = torch.tensor([PROBED[1] - PROBED[0]], device=keys.device)
    # Models compute angles in float32 at best.
    near = 8 * torch.finfo(keys.dtype).eps + 1e-5
    # Number by number: a large one (a bias) must not hide that others turn.
    if bool(((here - there).abs() <= near * here.abs()).all()):
        return None
    for frequencies in (each.to(keys.device) for each in found):
        behind = keys.shape[-1] - 2 * len(frequencies)
        # Frequencies of layers with larger heads.
        if behind < 0:
            continue
        for start in dict.fromkeys((0, behind)):
            for interleaved in (False, True):
                guess = Rotation(frequencies, start, interleaved)
                if guess.explains(here, there, by, near):
                    return guess
    raise _unknown(base, purpose, _UNEXPLAINED)


_UNEXPLAINED = (
    "its keys are not turned by their position as RoPE does, nor is it known to tell positions by "
    "exact distances (the ALiBi of Falcon is rounded to bfloat16), so they cannot be moved"
)


def _unknown(base: Any, purpose: _Purpose, why: str) -> KVPruneError:
    return KVPruneError(f"{purpose.name} with {type(base).__name__}: {why}. {purpose.advice}")


def limit_of(base: Any) -> int | None:
    """The position from which on a model's RoPE changes its frequencies."""
    config = base.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind == "longrope":
        return int(rope["original_max_position_embeddings"])
    return int(config.max_position_embeddings) if kind == "dynamic" else None


def check_reach(positions: Tensor, limit: int | None) -> None:
    """Refuses positions `[B, Q]` where the model changes its frequencies; see `limit_of`.

    Raises:
        KVPruneError: see above.
    """
    if limit is not None and int(positions.max()) >= limit:
        raise KVPruneError(
            f"positions inside the cache, or of queries that are to be seen before rotation, reach "
            f"{limit}, from where on this model changes its frequencies: expected shorter inputs; "
            f"or, inside the cache, a smaller budget and prompts that are read in chunks "
            f"(prefill_chunk_size)"
        )
