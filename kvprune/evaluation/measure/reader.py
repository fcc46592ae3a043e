"""A model that has read a prompt with one cache, and what that cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...cache.composed import ComposedCache
from ...errors import KVPruneError
from ...models.devices import device_of, devices_of
from ...models.families import cannot_record
from ...models.structure import argument, unwrapped
from ...policy.base import TokenPolicy
from ...storage.layer import SlotLayer
from ..ledger.results import Cost
from .flops import Flops, layers_of, own_flops
from .reading import forward, read_last, read_lead, read_prompt
from .watch import now

PIECE = 64
"""Tokens of a text that are scored at once: their logits over the vocabulary are held."""


@dataclass
class Reading:
    """A prompt that a cache has read all of but its last token, and what that took.

    tokens: `[1, n]`. entered: tokens that entered each layer; empty if there was no such forward.
    seconds: None where it was read for several caches. own: FLOPs that policies computed
    themselves, where those were counted.
    """

    cache: ComposedCache
    tokens: Tensor
    entered: list[int]
    seconds: float | None
    own: float = 0.0

    @classmethod
    def of(cls, model: Any, prompt: Sequence[int], cache: ComposedCache) -> Reading:
        """Reads it.

        Raises:
            KVPruneError: no prompt, or policies that do not work on the model.
        """
        if not prompt:
            raise KVPruneError("a sample's prompt: expected at least one token, got none")
        tokens = torch.tensor([list(prompt)], device=device_of(model))
        with _entering(model) as entered:
            began = now(devices_of(model))
            read_lead(model, cache, tokens)
            return cls(cache, tokens, entered, now(devices_of(model)) - began)


class CacheReader:
    """Reads a prompt with a fresh cache, its last token by itself; then it can be asked once.

    So all that it says is told from what the cache holds once it was evicted from; see `reading`.
    Implements `tasks.base.Reader`.

    Args:
        model: attached.
        tokenizer: of the model.
        lead: the prompt, all but its last token read; see `Reading.of`.
    """

    def __init__(self, model: Any, tokenizer: Any, lead: Reading) -> None:
        self._model, self._tokenizer, self._lead = model, tokenizer, lead
        self.cache, self.tokens = lead.cache, lead.tokens.shape[1]
        self._home, self._devices = device_of(model), devices_of(model)
        # Of each layer, with the last token; an empty cache has no layers yet.
        in_use = [_in_use(layer) for layer in self.cache.layers]
        self._slots = [n + 1 for n in in_use or [0] * len(layers_of(model))]
        # Before the last token, which makes a cache that grows take room for many more.
        held, began = self.cache.nbytes, now(devices_of(model))
        self._next = read_last(model, self.cache, lead.tokens)[0]
        self._last = now(devices_of(model)) - began
        self._peak = max(held, self.cache.nbytes)
        self.bytes_held = held if lead.entered else self._peak
        self._kept = _kept(self.cache)
        self._rate: float | None = None
        self._asked = False

    def generate(self, tokens: int) -> str:
        """Up to so many greedy tokens behind the prompt, as text; ends at eos.

        They are those of `model.generate(cache=..., do_sample=False)` with `prefill_chunk_size` one
        less than the prompt's tokens, but that a share of the prompt is then one of all its tokens.
        """
        self._ask()
        ends, found = _eos(self._model, self._tokenizer), list[int]()
        began = now(self._devices)
        for left in reversed(range(tokens)):
            token = int(self._next.argmax())
            if token in ends:
                break
            found.append(token)
            if left:
                self._next = self._forward(self._ids([token]))[-1]
        seconds, steps = now(self._devices) - began, self.cache.seen - self.tokens
        self._rate = steps / seconds if steps else None
        self._peak = max(self._peak, self.cache.nbytes)
        text: str = self._tokenizer.decode(found, skip_special_tokens=True)
        return text

    def log_likelihood(self, text: str | Sequence[int]) -> list[float]:
        """Of each token of a text behind the prompt, in nats, the text as it stands.

        Every token is predicted from what the cache holds after the tokens before it were read
        one by one, each with its eviction, and none of them is pruned.
        """
        self._ask()
        tokens: Sequence[int] = (
            self._tokenizer.encode(text, add_special_tokens=False)
            if isinstance(text, str)
            else text
        )
        logits, found = self._next[None], list[float]()
        for piece in self._pieces(tokens[:-1]):
            found += _of(logits, tokens[len(found) : len(found) + len(logits)])
            logits = self._forward(self._ids(piece), len(piece))
        found += _of(logits[: len(tokens) - len(found)], tokens[len(found) :])
        self._peak = max(self._peak, self.cache.nbytes)
        return found

    def cost(self, flops: Flops, own: float) -> Cost:
        """What it cost so far.

        Args:
            flops: of the model.
            own: what the policies compute themselves for this prompt, see `own_prefill_flops`.
        """
        before = self._lead.seconds
        return Cost(
            prefill_seconds=None if before is None else before + self._last,
            prefill_flops=self._flops(flops) + own,
            decode_tokens_per_second=self._rate,
            bytes_held=self.bytes_held,
            bytes_peak=self._peak,
            prompt_tokens=self.tokens,
            entered=tuple(n + 1 for n in self._lead.entered or [0] * len(self._slots)),
            kept=self._kept,
        )

    def _flops(self, flops: Flops) -> float:
        """Of the two forwards that read the prompt."""
        last = flops.of_prompt(1, [1] * len(self._slots), self._slots)
        if not self._lead.entered:
            return last
        return flops.of_prompt(self.tokens - 1, self._lead.entered) + last

    def _ask(self) -> None:
        if self._asked:
            raise KVPruneError("a reader was asked twice: expected one question of each sample")
        self._asked = True

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self._home)

    def _forward(self, ids: Tensor, logits: int = 1) -> Tensor:
        """`[1, n]` to the logits `[logits, V]`."""
        given = forward(self._model, ids, self.cache, asked=logits)
        if self._recording:
            # What was read stays: evicted for good, not merely on record.
            self.cache.crop(0)
        return given[0]

    _recording = False

    def _pieces(self, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        """How a text may be cut into forwards so that each policy acts as in decoding.

        A policy is asked once a forward, and one that prunes would prune a text of several
        tokens. Where the cache can record drafts, which are read as if one by one, many go at
        once all the same; and where no policy has a hook there is nothing to ask.
        """
        together = PIECE
        if any(policy.hooks for policy in self.cache.policies):
            self._recording = not cannot_record(unwrapped(self._model))
            together = PIECE if self._recording else 1
        if self._recording:
            self.cache.activate_past_recording()
        for start, stop in pairwise([*range(0, len(tokens), together), len(tokens)]):
            yield tokens[start:stop]


def own_prefill_flops(model: Any, prompt: Sequence[int], policies: Sequence[TokenPolicy]) -> float:
    """What the policies compute themselves while a prompt is read; reads it once, slowly."""
    tokens = torch.tensor([list(prompt)], device=device_of(model))
    with own_flops() as counted:
        read_prompt(model, ComposedCache(policies), tokens)
    return sum(counted)


def _in_use(layer: Any) -> int:
    """Slots in use once the next token has come, without it; 0 where a layer has a state."""
    if not isinstance(layer, SlotLayer):
        return 0
    return layer.used - (layer.free_slot is not None)


def _of(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """The log-likelihood of tokens under the logits `[n, V]` for them."""
    if not len(tokens):
        return []
    wanted = torch.tensor(list(tokens), device=logits.device)
    # In double precision for a model that is, as everywhere.
    precise = logits if logits.dtype == torch.float64 else logits.float()
    found: list[float] = precise.log_softmax(-1).gather(1, wanted[:, None])[:, 0].tolist()
    return found


def _eos(model: Any, tokenizer: Any) -> set[int]:
    """The tokens at which `generate` ends."""
    named = model.generation_config.eos_token_id
    named = tokenizer.eos_token_id if named is None else named
    return set(named) if isinstance(named, (list, tuple)) else {named}


def _kept(cache: ComposedCache) -> tuple[float | None, ...]:
    """Slots that each layer holds, on average over its heads; None where it holds a state."""
    found: list[float | None] = [None] * len(cache)
    for layer, _ in cache.slot_layers():
        found[layer] = float((cache.columns(layer)[0] >= 0).sum(-1).double().mean())
    return tuple(found)


@contextmanager
def _entering(model: Any) -> Iterator[list[int]]:
    """Notes how many tokens enter each layer, as the hooks of `attach` leave them."""
    entered: list[int] = []

    def note(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(argument(layer, args, kwargs, "hidden_states").shape[1])

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in layers_of(model)]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()
