"""ComposedCache: a key/value cache that holds only what its policies keep.

A facade: what is held is in `state`, what `generate` says in `session`, who uses the cache in
`guard`, the model in `binding`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import KVPruneError
from ..policy.base import TokenPolicy
from ..policy.checks import checked
from ..statistics import Statistic, check_statistics
from ..storage.quantized import Quantized
from . import saving
from .becoming import check_becomes, evict_all, take_dynamic
from .binding import attached
from .guard import in_use
from .session import checked_lengths
from .wired import WiredCache


class ComposedCache(WiredCache):
    """A key/value cache that holds only what its policies keep.

    Pass it to an attached model (`kvprune.attach`), as `cache=` or `past_key_values=`, to its
    `generate` or to its forward. One cache serves one batch of
    sequences; `copy.deepcopy(cache)` is independent, which is how a prefix is reused.

    Args:
        policies: a pipeline: each policy sees the survivors of those before it, so a token
            stays only if all keep it. `a | b` keeps what either keeps. An empty list is
            dense.
        observe: statistics to observe though no policy wants them, as `(Attention(),)`, for
            policies that come later, by `with_policies` or `load`; see `kvprune.statistics`.
        store: how keys and values are held, as `Quantized(bits=4)`; None for as the model made
            them.

    Raises:
        KVPruneError: not a list of policies, or unknown statistics, layers or stores.

    Attributes:
        seen: columns shown so far, padding included: the logical length. Positions, masks
            and `get_seq_length()` follow it, whatever was evicted.
        policies: as they were handed in.
        observe: likewise.
        store: likewise.
        on_evict: a function that is called with an `Eviction` (`kvprune.cache.evictions`) for each
            layer that a forward made smaller, behind that forward (where drafts are recorded, once
            it is known which of them stay); None for nobody, which costs nothing. An error of its
            own reaches whoever called the model; the cache is as it was without it.
        state: what is held; for the library's own use, as are the three below.
        session: what `generate` has said.
        guard: who uses the cache.
        binding: the model that the cache is tied to; None before its first use.
    """

    def __init__(
        self,
        policies: Sequence[TokenPolicy] = (),
        observe: Sequence[Statistic] = (),
        store: Quantized | None = None,
    ) -> None:
        wanted = tuple(observe) if isinstance(observe, list) else observe
        check_statistics(wanted, "ComposedCache: observe")
        if store is not None and not isinstance(store, Quantized):
            raise KVPruneError(
                f"ComposedCache: store={store!r}: expected a store, as kvprune.Quantized(bits=4), "
                f"or None"
            )
        super().__init__(checked(policies), tuple(wanted), store)

    # What a user reads.

    def columns(self, layer: int) -> Tensor:
        """The columns that a layer holds.

        Returns:
            int64 `[B, 1|Hkv, S]`, sorted, -1 first where a row or head has fewer; the head
            axis is 1 while all heads hold the same. Padding is never listed.

        Raises:
            KVPruneError: there is no such layer, it holds no slots, or nothing was stored yet.
        """
        if not self.layers or not self.state.slots(layer).is_initialized:
            raise KVPruneError("the cache is empty: expected a forward of an attached model first")
        ordered = self.state.slots(layer).columns.sort(dim=-1).values
        most = int((ordered >= 0).sum(-1).amax()) if ordered.numel() else 0
        return ordered[..., ordered.shape[-1] - most :].clone()

    def attended(self, layer: int) -> Tensor:
        """The columns that the last forward attended to, one for each of its `attentions`.

        Eviction comes after attention, so these are not the columns that the layer holds now (see
        `columns`). `generate` runs many forwards; a logits processor can ask after each.

        Returns:
            int64 `[B, 1|Hkv, S]`, sorted, -1 first where a row or head has fewer. S is the last
            axis of `attentions[layer]`, `[B, Hq, Q, S]`; query heads of one kv head are neighbours.

        Raises:
            KVPruneError: the last forward was not asked for attentions, or its backend has none.
        """
        at = layer % len(self) if -len(self) <= layer < len(self) else layer
        if at not in self.state.attended:
            raise KVPruneError(
                f"attended({layer!r}): the last forward gave no attentions of this layer: expected "
                f"output_attentions=True in a forward of a model with attn_implementation='eager', "
                f"and a layer of 0 to {len(self) - 1} with attention"
            )
        return self.state.attended[at].clone()

    @property
    def nbytes(self) -> int:
        """Bytes of all storage that the cache has allocated for slots and what it knows of rows.

        Without the ids of what was read as prompt, which are kept to know it again: 4 bytes a
        column and row, in main memory.
        """
        storages = ((t.device, t.untyped_storage()) for t in self.state.tensors())
        return sum({(at, s.data_ptr()): s.nbytes() for at, s in storages}.values())

    def __repr__(self) -> str:
        store = "" if self.store is None else f", store={self.store!r}"
        head = f"ComposedCache([{', '.join(map(repr, self.policies))}]{store})"
        try:
            return f"{head}: {self._described()}"
        except Exception as error:
            # Whoever prints a cache may be looking for what went wrong in it: layers may be
            # half-made after an error, or change meanwhile.
            return f"{head}: seen {self.seen} columns, in disorder ({type(error).__name__})"

    def _described(self) -> str:
        """The part of `repr` behind the policies."""
        failed = f"\n  cannot be used any more: {self.guard.failure}" if self.guard.failure else ""
        if not self.is_initialized:
            return f"empty{failed}"
        lines = [f"seen {self.seen} columns, {self.nbytes / 2**20:.2f} MiB{failed}"]
        counts = [
            (i, self.columns(i).shape[-1] if layer.is_initialized else 0)
            for i, layer in self.state.slot_layers()
        ]
        for kept, run in itertools.groupby(counts, key=lambda item: item[1]):
            layers = [i for i, _ in run]
            span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
            lines.append(f"  {span}: {kept}/{self.seen} slots")
        return "\n".join(lines)

    @contextmanager
    def prompt(self, lengths: int | Sequence[int] | Tensor) -> Iterator[None]:
        """Announces a prompt, for loops of one's own: the forwards within are its pieces.

            with cache.prompt(len(ids[0])):
                for piece in ids.split(512, dim=1):
                    model(piece, cache=cache)

        Shares are shares of the whole prompt then, and policies with `when="prompt"` are asked
        once, when its last token was read. `generate` announces its prompts by itself.

        Args:
            lengths: how many new tokens each row has, padding not counted: one number, or `[B]`.
                The prompt has as many columns as its longest row.

        Raises:
            KVPruneError: no whole numbers of at least 1; the cache is in use, or within another
                announced prompt; at the end, fewer columns were read than were announced.
        """
        self.guard.check_usable()
        if self.session.in_generate:
            raise in_use("generate")
        if self.session.prompt_end:
            raise KVPruneError("prompt: expected one announced prompt after the other, got two")
        new = checked_lengths(lengths)
        end = self.seen + int(new.max())
        self.announce_prompt(new if new.dim() else int(new), end)
        try:
            yield
        finally:
            self.session.announce(0, 0, None)
        if self.seen < end:
            raise KVPruneError(
                f"prompt({lengths!r}): expected {end - self.seen} columns more before the end of "
                f"the block. Policies that are asked at a prompt's end were not asked"
            )

    def reset(self) -> None:
        """Forgets everything, also its model, and frees the memory; it is as a new one then.

        Raises:
            KVPruneError: a forward or `generate` with this cache is under way. One that was
                interrupted, as by Ctrl-C, is not.
        """
        what = (
            "generate" if self.session.in_generate else "forward" if self.guard.in_forward else ""
        )
        if what:
            raise KVPruneError(
                f"reset: this cache is in the middle of a {what}, which would go on with nothing: "
                f"expected a reset once the {what} is over. Use a new ComposedCache meanwhile"
            )
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> ComposedCache:
        # Shared, not copied: the policies, which hold no state, and the model.
        memo[id(self.policies)] = self.policies
        memo[id(self.binding)] = self.binding
        # Whoever listens to this cache listens to its copy.
        memo[id(self.on_evict)] = self.on_evict
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        self.guard.claim()
        try:
            for name, value in self.__dict__.items():
                twin.__dict__[name] = copy.deepcopy(value, memo)
        finally:
            self.guard.release()
        # The copy of a cache in `generate` is in none.
        while twin.session.in_generate:
            twin.leave_generate()
        return twin

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the cache to a file, whole or not at all; see `load` and `kvprune.cache.saving`.

        Raises:
            KVPruneError: nothing was read yet, a forward or `generate` is under way, an error
                left the cache unusable, or the file cannot be written.
        """
        self.guard.check_usable()
        if self.session.in_generate:
            raise in_use("generate")
        if self.binding is None or not self.is_initialized:
            raise KVPruneError("save: the cache is empty: expected a forward of a model first")
        if self.state.is_hybrid:
            raise KVPruneError(
                f"save: {self.binding.model['name']} has linear-attention layers, whose states are "
                f"not written: expected a model with attention in every layer. "
                f"copy.deepcopy(cache) keeps them in memory"
            )
        with self.guard.moving("a save"):
            self.state.settle()
        contents = saving.contents_of(self.state, self.binding.model, self.policies, self.store)
        saving.write(Path(path), contents)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        policies: Sequence[TokenPolicy],
        model: torch.nn.Module,
        store: Quantized | None = None,
    ) -> ComposedCache:
        """A cache that goes on, bit for bit, where the one that was saved stopped.

        Args:
            path: what `save` wrote.
            policies: the same, or others whose statistics were observed: what they say counts
                from the next step on. Budgets may differ; what was dropped does not come back.
            model: the one that the cache was saved with, attached.
            store: the one that the cache was saved with: codes are not made anew.

        Raises:
            KVPruneError: there is no such file, it is damaged, of another version, model or store,
                or lacks a statistic that a policy needs; or the model is not attached.
        """
        cache = cls(policies, store=store)
        attachment, base = attached(model, "load")
        cache.bind(attachment, base)
        assert cache.binding is not None
        contents = saving.read(Path(path))
        known = cache.binding.model
        saving.check_fits(
            cache.state, known, cache.policies, cache.store, Path(path), contents.numbers
        )
        saving.restore(cache.state, contents, base)
        return cache

    @classmethod
    def from_dynamic(
        cls,
        cache: DynamicCache,
        policies: Sequence[TokenPolicy],
        model: torch.nn.Module,
        *,
        attention_mask: Tensor | None = None,
        store: Quantized | None = None,
    ) -> ComposedCache:
        """A cache that holds what policies keep of a `DynamicCache` that was filled elsewhere.

        It is as if this cache had read all of that, in one forward, as a prompt. The other cache
        stays as it is.

        Args:
            cache: what this model has read.
            policies: a pipeline of policies that go by keys, values and columns alone, as `Knorm`,
                `KeyDiff`, `StreamingLLM`, and policies around them. A `DynamicCache` knows nothing
                of attention, queries or hidden states.
            model: the one that has read it, attached.
            attention_mask: `[B, seen]`, 0 for padding on the left; None for none.
            store: see `ComposedCache`.

        Raises:
            KVPruneError: an empty cache, one of another class, or with another number of layers, or
                with layers that keep a state; policies that prune hidden states, observe something,
                or assign positions inside the cache.
        """
        twin = cls(policies, store=store)
        attachment, base = attached(model, "from_dynamic")
        twin.bind(attachment, base)
        take_dynamic(twin, cache, attention_mask, base)
        return twin

    def with_policies(
        self, policies: Sequence[TokenPolicy], model: torch.nn.Module
    ) -> ComposedCache:
        """The cache that these policies would have, had they read the same in one forward.

        But for shares: the prompt that they are of is what this cache took for its prompt. Single
        tokens after the first forward are none; and `crop` makes a prompt shorter only where fewer
        tokens are left than it had.

        So one reading of a prompt serves several budgets: read it with `ComposedCache(observe=
        (Attention(),))`, and give each policy its own. This cache stays as it is.

        Args:
            policies: those that prune hidden states the same as this cache's, equal and in the
                same order; those that evict slots any whose statistics were observed.
            model: the one that the cache was used with, attached.

        Raises:
            KVPruneError: nothing was read yet or this cache is in use, it has a policy that
                evicts, or others that prune; a policy wants what was not observed, or assigns
                positions inside the cache; or the model is another.
        """
        self.guard.check_usable()
        if self.session.in_generate:
            raise in_use("generate")
        twin = type(self)(policies, store=self.store)
        attachment, base = attached(model, "with_policies")
        twin.bind(attachment, base)
        assert twin.binding is not None
        mine = self.policies, self.binding, self.state
        check_becomes(*mine, twin.policies, twin.binding, twin.state)
        held = copy.deepcopy(self)
        layers = zip(held.state.slot_layers(), twin.state.slot_layers(), strict=True)
        for (_, layer), (_, wanted) in layers:
            layer.narrow_statistics(wanted.parts)
            layer.divides = wanted.divides
        # What was read was read by the model as it was then.
        assert self.binding is not None
        held.binding = replace(twin.binding, model=self.binding.model)
        held.policies, held.observe = twin.policies, ()
        evict_all(twin.binding, held.state, base)
        return held
