"""A model that has read a prompt with one cache, and the cost of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from ...wiring.forward import cache_in
from ..ledger.results import Cost
from .flops import Flops, layers_of, own_flops
from .reading import forward, read_last, read_lead, read_prompt
from .watch import now

PIECE = 64
"""The most tokens of a text that are scored at once: their logits over the vocabulary are held."""


@dataclass
class Reading:
    """A prompt of which a cache has read all but the last tokens, and the cost of that.

    Attributes:
        cache: the cache.
        tokens: `[1, n]`, the token ids of the prompt.
        entered: for each layer, the tokens that entered it; empty for a prompt of one token, of
            which nothing is read yet.
        repeats: the tokens of each forward of a second reading; empty where there was none.
        seconds: the time of the readings; None if the prompt was read for several caches.
        own: the FLOPs that policies computed themselves, if they were counted.
        behind: how many tokens are left: the last one, or a question.
    """

    cache: ComposedCache
    tokens: Tensor
    entered: list[int]
    seconds: float | None
    repeats: Sequence[int] = ()
    own: float = 0.0
    behind: int = 1

    @classmethod
    def of(
        cls, model: Any, prompt: Sequence[int], cache: ComposedCache, behind: int = 1
    ) -> Reading:
        """Reads all of a prompt but its last tokens.

        Args:
            model: an attached model.
            prompt: the token ids of the prompt.
            cache: an empty cache.
            behind: how many tokens are left, at least 1.

        Raises:
            KVPruneError: an empty prompt, or policies that do not work on the model.
        """
        if not prompt:
            raise KVPruneError("a sample's prompt: expected at least one token, got none")
        tokens = torch.tensor([list(prompt)], device=device_of(model))
        with _entering(model) as (entered, repeats):
            began = now(devices_of(model))
            read_lead(model, cache, tokens[:, : tokens.shape[1] + 1 - behind])
            seconds = now(devices_of(model)) - began
            return cls(cache, tokens, entered, seconds, repeats, behind=behind)

    def serves(self, prompt: Sequence[int], behind: int) -> bool:
        """Whether another prompt begins with the very tokens that were read, all but the last."""
        return list(prompt[:-behind]) == self.tokens[0, : -self.behind].tolist()

    def of_other(self, prompt: Sequence[int], behind: int) -> Reading:
        """The reading of a prompt that this one serves; the cache is the same."""
        tokens = self.tokens.new_tensor([list(prompt)])
        return replace(self, tokens=tokens, behind=behind)


class CacheReader:
    """A reader of a prompt, which reads the last tokens by themselves and then can be asked once.

    So everything that it says depends on what the cache holds after eviction; see `reading.py`. It
    implements `Reader` of `tasks/base.py`.

    Args:
        model: an attached model.
        tokenizer: the model's tokenizer.
        lead: the prompt, all but its last tokens read; see `Reading.of`.
    """

    def __init__(self, model: Any, tokenizer: Any, lead: Reading) -> None:
        self._model, self._tokenizer, self._lead = model, tokenizer, lead
        self.cache, self.tokens = lead.cache, lead.tokens.shape[1]
        self._home, self._devices = device_of(model), devices_of(model)
        # The slots of each layer behind the lead; an empty cache has no layers yet.
        in_use = [_in_use(layer) for layer in self.cache.layers]
        self._slots = in_use or [0] * len(layers_of(model))
        self._behind = [1]
        # Counted before the last token, for which a cache that grows takes room for many more
        # tokens.
        held, self._held = self.cache.nbytes, _kept(self.cache)
        began = now(devices_of(model))
        question = lead.tokens[0, -lead.behind : -1].tolist()
        for piece in self._pieces(question) if question else ():
            self._forward(self._ids(piece))
            self._behind.insert(-1, len(piece))
        if self._recording:
            self._next = self._forward(lead.tokens[:, -1:])[-1]
        else:
            self._next = read_last(model, self.cache, lead.tokens)[0]
        self._last = now(devices_of(model)) - began
        self._peak = max(held, self.cache.nbytes)
        # Before the last token of a prompt of one token, the cache is empty.
        self.bytes_held = held if lead.entered else self._peak
        self._kept = _kept(self.cache)
        self._rate: float | None = None
        self._asked = False

    def generate(self, tokens: int) -> str:
        """Up to `tokens` greedy tokens behind the prompt, as text; ends at eos.

        `model.generate(cache=..., do_sample=False)` gives the same tokens, if `prefill_chunk_size`
        is one less than the prompt's tokens; but there a share of the prompt is a share of all its
        tokens, and policies that are asked at a prompt's end are asked a token later.
        """
        self._ask()
        ends, found = _eos(self._model, self._tokenizer), list[int]()
        began = now(self._devices)
        for left in reversed(range(tokens)):
            token = int(self._next.argmax())
            if token in ends:
                break
            found.append(token)
            # The last token need not be read: nothing follows it.
            if left:
                self._next = self._forward(self._ids([token]))[-1]
        seconds, steps = now(self._devices) - began, self.cache.seen - self.tokens
        self._rate = steps / seconds if steps else None
        self._peak = max(self._peak, self.cache.nbytes)
        text: str = self._tokenizer.decode(found, skip_special_tokens=True)
        return text

    def log_likelihood(self, text: str | Sequence[int]) -> list[float]:
        """The log-likelihood of each token of a text behind the prompt, in nats.

        The text is taken as it stands, without a space or a special token more. Every token is
        predicted from what the cache holds after the tokens before it were read one by one, each
        with its eviction. None of them is pruned.
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
        """The cost so far.

        Args:
            flops: the costs of the model's parts.
            own: the FLOPs that the policies compute themselves for this prompt; see
                `own_prefill_flops`.
        """
        before = self._lead.seconds
        return Cost(
            prefill_seconds=None if before is None else before + self._last,
            prefill_flops=self._flops(flops) + own,
            decode_tokens_per_second=self._rate,
            bytes_held=self.bytes_held,
            bytes_peak=self._peak,
            prompt_tokens=self.tokens,
            entered=tuple(
                n + self._lead.behind for n in self._lead.entered or [0] * len(self._slots)
            ),
            kept=self._kept,
            # An empty cache has no layers yet.
            held=self._held or self._kept,
        )

    def _flops(self, flops: Flops) -> float:
        """The FLOPs of the forwards that read the prompt, once or twice."""
        found, read = 0.0, 0
        for count in self._behind:
            read += count
            # As if nothing went meanwhile.
            slots = [n + read for n in self._slots]
            found += flops.of_prompt(count, [count] * len(slots), slots)
        if not self._lead.entered:
            return found
        found += flops.of_prompt(self.tokens - read, self._lead.entered)
        for count in self._lead.repeats:
            entered, slots = [count] * len(self._slots), [n + count for n in self._lead.entered]
            found += flops.of_prompt(count, entered, slots)
        return found

    def _ask(self) -> None:
        if self._asked:
            raise KVPruneError("a reader was asked twice: expected one question of each sample")
        self._asked = True

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self._home)

    def _forward(self, ids: Tensor, logits: int = 1) -> Tensor:
        """Reads token ids `[1, n]`; returns the logits `[logits, V]` of the last of them."""
        given = forward(self._model, ids, self.cache, asked=logits)
        if self._recording:
            # No token is taken back, so what was evicted may go for good and not only on record.
            self.cache.crop(0)
        return given[0]

    # Whether the cache records drafts; see `_pieces`.
    _recording = False

    def _pieces(self, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        """Cuts a text into forwards, so that each policy acts as in decoding.

        A policy is asked once a forward, and a policy that prunes would prune a text of several
        tokens. If the cache can record drafts, which are read as if one by one, many tokens go into
        one forward all the same. If no policy has a hook, nothing is asked, and many tokens go into
        one forward too. Otherwise each token has its own forward.
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
    """The FLOPs that the policies compute themselves while a prompt is read.

    The prompt is read once for that, slowly.
    """
    tokens = torch.tensor([list(prompt)], device=device_of(model))
    with own_flops() as counted:
        read_prompt(model, ComposedCache(policies), tokens)
    return sum(counted)


def _in_use(layer: Any) -> int:
    """The slots in use before the next token is stored; 0 for a layer with a state."""
    return layer.in_use if isinstance(layer, SlotLayer) else 0


def _of(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """The log-likelihoods of tokens under the logits `[n, V]` that predict them."""
    if not len(tokens):
        return []
    wanted = torch.tensor(list(tokens), device=logits.device)
    # In double precision for a model in double precision, as everywhere; else in float32.
    precise = logits if logits.dtype == torch.float64 else logits.float()
    found: list[float] = precise.log_softmax(-1).gather(1, wanted[:, None])[:, 0].tolist()
    return found


def _eos(model: Any, tokenizer: Any) -> set[int]:
    """The tokens at which `generate` ends."""
    named = model.generation_config.eos_token_id
    named = tokenizer.eos_token_id if named is None else named
    return set(named) if isinstance(named, (list, tuple)) else {named}


def _kept(cache: ComposedCache) -> tuple[float | None, ...]:
    """The slots that each layer holds, a mean over its heads; None for a layer with a state."""
    found: list[float | None] = [None] * len(cache)
    for layer, _ in cache.slot_layers():
        found[layer] = float((cache.columns(layer)[0] >= 0).sum(-1).double().mean())
    return tuple(found)


@contextmanager
def _entering(model: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Notes how many tokens enter each layer, after the hooks of `attach` have pruned.

    Returns:
        by layer, in the first reading; and by forward, in a second one.
    """
    entered: list[int] = []
    repeats: list[int] = []

    def note(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Not what a cache reads of a model before its first use, as how it turns its keys.
        cache = cache_in(layer, args, kwargs)
        if cache is None:
            return
        count = argument(layer, args, kwargs, "hidden_states").shape[1]
        if cache.step.repeat is None:
            entered.append(count)
        elif layer is layers_of(model)[0]:
            repeats.append(count)

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in layers_of(model)]
    try:
        yield entered, repeats
    finally:
        for hook in hooks:
            hook.remove()
