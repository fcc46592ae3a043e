"""ComposedCache: policies, and the slot layers of one batch of sequences."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from . import saving
from .binding import Attachment, check_works, checked, new_layer
from .endings import Endings
from .errors import KVPruneError
from .families import base_of, unwrapped
from .masks import OURS
from .policy import TokenPolicy
from .positions import Inside, positions_for
from .releases import LinearAttentionLayer
from .rows import PromptIds, RowNumbers, rows_after
from .slots import SlotLayer
from .statistics import check_names
from .step import (
    Arrival,
    LayerStep,
    Step,
    asked_tokens,
    new_columns,
    padding_so_far,
)
from .together import Together


@dataclass(frozen=True)
class _Generate:
    """One `generate` that is under way.

    thread: whose it is. custom: whether it runs a function of the user's, which may use the cache
    as it likes, by a `generate` of its own too. seen, promise, prompt_end, endings, recording: what
    they were before it.
    """

    thread: int
    custom: bool
    seen: int
    promise: Tensor | int
    prompt_end: int
    endings: Endings | None
    recording: bool


class ComposedCache(Cache):
    """A key/value cache that holds only what its policies keep.

    Pass it to an attached model (`kvprune.attach`), as `cache=` or `past_key_values=`, to its
    `generate` or to its forward. One cache serves one batch of
    sequences; `copy.deepcopy(cache)` is independent, which is how a prefix is reused.

    Args:
        policies: a pipeline: each policy sees the survivors of those before it, so a token
            stays only if all keep it. `a | b` keeps what either keeps. An empty list is
            dense.
        observe: statistics to observe though no policy wants them (see `statistics.OBSERVABLE`),
            for policies that come later, by `with_policies` or `load`.

    Raises:
        KVPruneError: not a list of policies, or unknown statistics or layers.

    Attributes:
        seen: columns shown so far, padding included: the logical length. Positions, masks
            and `get_seq_length()` follow it, whatever was evicted.
    """

    layers: list[Any]  # SlotLayer, or LinearAttentionLayer in hybrid models

    def __init__(self, policies: Sequence[TokenPolicy] = (), observe: Sequence[str] = ()) -> None:
        super().__init__(layers=[])
        self.policies = checked(policies)
        self._observe = tuple(observe)
        check_names(self._observe, "ComposedCache: observe")
        self._begin()

    def _begin(self) -> None:
        """All that is not the user's choice, as it is in a cache that nothing was done with."""
        self.layers = []
        # What the policies are on the model that the cache is tied to.
        self._working: tuple[TokenPolicy, ...] = ()
        self.seen = 0
        self._attachment: Attachment | None = None
        # What the model was when the cache was tied to it, for `save`; see `saving.describe`.
        self._model: dict[str, str] = {}
        # By layer, the columns that the last forward attended to, if it was asked for attentions.
        self._attended: dict[int, Tensor] = {}
        self._rows: RowNumbers | None = None
        # What was read as prompt, to know it again.
        self._read: PromptIds | None = None
        self._positions: Inside | None = None
        # Of the last step, layers that evict at once.
        self._together: list[Together] = []
        # Which columns are padding `[B, n]`; those behind are not. None while none is.
        self._padding: Tensor | None = None
        self._promise: Tensor | int = 0
        # The `generate` that is under way; several where a custom one runs another.
        self._generates: list[_Generate] = []
        # Of the innermost one, which rows have ended.
        self._endings: Endings | None = None
        # Whether a `generate` that is not ours has taken the cache, and has read nothing yet.
        self._in_stock_generate = False
        # Whether the newest columns may be taken back, how many of the last forward's can be
        # where something was evicted since, and up to which column `generate` reads a prompt.
        self._recording = False
        self._recorded = 0
        # Drafts of the last forward that nobody has accepted or taken back yet.
        self._pending = 0
        self._prompt_end = 0
        # Columns that stay for good: what a cache evicted before it was saved is unknown.
        self._fixed = 0
        # By thread, as one that is refused must not speak for the one that is not.
        self._logits_to_keep: dict[int, int | Tensor] = {}
        # A dict, since its setdefault is atomic: two threads cannot both open a step. (A lock
        # could be neither deep-copied nor pickled.)
        self._open: dict[str, tuple[int, Step | None]] = {}
        self._failure = ""

    # What a user reads.

    def __len__(self) -> int:
        return len(self.layers)

    def __bool__(self) -> bool:
        # A cache that has no layers yet is not "no cache".
        return True

    def columns(self, layer: int) -> Tensor:
        """The columns that a layer holds.

        Returns:
            int64 `[B, 1|Hkv, S]`, sorted, -1 first where a row or head has fewer; the head
            axis is 1 while all heads hold the same. Padding is never listed.

        Raises:
            KVPruneError: there is no such layer, it holds no slots, or nothing was stored yet.
        """
        if not self.layers or not self._slots(layer).is_initialized:
            raise KVPruneError("the cache is empty: expected a forward of an attached model first")
        ordered = self._slots(layer).columns.sort(dim=-1).values
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
        if at not in self._attended:
            raise KVPruneError(
                f"attended({layer!r}): the last forward gave no attentions of this layer: expected "
                f"output_attentions=True in a forward of a model with attn_implementation='eager', "
                f"and a layer of 0 to {len(self) - 1} with attention"
            )
        return self._attended[at].clone()

    @property
    def nbytes(self) -> int:
        """Bytes of all storage that the cache has allocated for slots and what it knows of rows.

        Without the ids of what was read as prompt, which are kept to know it again: 4 bytes a
        column and row, in main memory.
        """
        held = [t for layer in self.layers for t in _tensors(layer)]
        held += self._attended.values()
        if self._rows is not None:
            held += self._rows.tensors()
        if self._padding is not None:
            held.append(self._padding)
        if self._positions is not None:
            held += self._positions.tensors()
        storages = ((t.device, t.untyped_storage()) for t in held)
        return sum({(at, s.data_ptr()): s.nbytes() for at, s in storages}.values())

    def __repr__(self) -> str:
        head = f"ComposedCache([{', '.join(map(repr, self.policies))}])"
        try:
            return f"{head}: {self._described()}"
        except Exception as error:
            # Whoever prints a cache may be looking for what went wrong in it: layers may be
            # half-made after an error, or change meanwhile.
            return f"{head}: seen {self.seen} columns, in disorder ({type(error).__name__})"

    def _described(self) -> str:
        """What `repr` says behind the policies."""
        failed = f"\n  cannot be used any more: {self._failure}" if self._failure else ""
        if not self.is_initialized:
            return f"empty{failed}"
        lines = [f"seen {self.seen} columns, {self.nbytes / 2**20:.2f} MiB{failed}"]
        counts = [
            (i, self.columns(i).shape[-1] if layer.is_initialized else 0)
            for i, layer in self.slot_layers()
        ]
        for kept, run in itertools.groupby(counts, key=lambda item: item[1]):
            layers = [i for i, _ in run]
            span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
            lines.append(f"  {span}: {kept}/{self.seen} slots")
        return "\n".join(lines)

    def reset(self) -> None:
        """Forgets everything, also its model, and frees the memory; it is as a new one then.

        Raises:
            KVPruneError: a forward or `generate` with this cache is under way. One that was
                interrupted, as by Ctrl-C, is not.
        """
        what = "generate" if self._generates else "forward" if self._open else ""
        if what:
            raise KVPruneError(
                f"reset: this cache is in the middle of a {what}, which would go on with nothing: "
                f"expected a reset once the {what} is over. Use a new ComposedCache meanwhile"
            )
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> ComposedCache:
        # Shared, not copied: the model it is bound to, and the policies, which hold no state.
        memo[id(self.policies)] = self.policies
        memo[id(self._working)] = self._working
        memo[id(self._attachment)] = self._attachment
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        self._claim()
        try:
            for name, value in self.__dict__.items():
                twin.__dict__[name] = {} if name == "_open" else copy.deepcopy(value, memo)
        finally:
            del self._open["step"]
        # The copy of a cache in `generate` is in none.
        while twin._in_generate:
            twin.leave_generate()
        return twin

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the cache to a file, whole or not at all; see `load` and `kvprune.saving`.

        Raises:
            KVPruneError: nothing was read yet, a forward or `generate` is under way, an error
                left the cache unusable, or the file cannot be written.
        """
        self._check_usable()
        if self._in_generate:
            raise self._in_use("generate")
        if not self.is_initialized:
            raise KVPruneError("save: the cache is empty: expected a forward of a model first")
        if self._is_hybrid:
            raise KVPruneError(
                f"save: {self._model['name']} has linear-attention layers, whose states are not "
                f"written: expected a model with attention in every layer. copy.deepcopy(cache) "
                f"keeps them in memory"
            )
        self._settle()
        saving.write(Path(path), saving.contents_of(self))

    @classmethod
    def load(
        cls, path: str | PathLike[str], policies: Sequence[TokenPolicy], model: torch.nn.Module
    ) -> ComposedCache:
        """A cache that goes on, bit for bit, where the one that was saved stopped.

        Args:
            path: what `save` wrote.
            policies: the same, or others whose statistics were observed: what they say counts
                from the next step on. Budgets may differ; what was dropped does not come back.
            model: the one that the cache was saved with, attached.

        Raises:
            KVPruneError: there is no such file, it is damaged, of another version or model, or
                lacks a statistic that a policy needs; or the model is not attached.
        """
        cache = cls(policies)
        base = cache._bind_to(model, "load")
        contents = saving.read(Path(path))
        saving.check_fits(cache, Path(path), contents.numbers)
        saving.restore(cache, contents, base)
        return cache

    def with_policies(
        self, policies: Sequence[TokenPolicy], model: torch.nn.Module
    ) -> ComposedCache:
        """What a cache with these policies would hold, had it read the same in one forward.

        But for shares: the prompt that they are of is what this cache took for its prompt. Single
        tokens after the first forward are none; and `crop` makes a prompt shorter only where fewer
        tokens are left than it had.

        So one reading of a prompt serves several budgets: read it with `ComposedCache(observe=
        ("attention",))`, and give each policy its own. This cache stays as it is.

        Args:
            policies: those that prune hidden states the same as this cache's, equal and in the
                same order; those that evict slots any whose statistics were observed.
            model: the one that the cache was used with, attached.

        Raises:
            KVPruneError: nothing was read yet or this cache is in use, it has a policy that
                evicts, or others that prune; a policy wants what was not observed, or assigns
                positions inside the cache; or the model is another.
        """
        self._check_usable()
        if self._in_generate:
            raise self._in_use("generate")
        twin = type(self)(policies)
        twin._bind_to(model, "with_policies")
        self._check_becomes(twin)
        held = copy.deepcopy(self)
        for (_, layer), (_, wanted) in zip(held.slot_layers(), twin.slot_layers(), strict=True):
            layer.narrow_statistics(wanted.names)
        held.policies, held._working, held._observe = twin.policies, twin._working, ()
        held._evict_all()
        return held

    def _check_becomes(self, twin: ComposedCache) -> None:
        """Refuses policies that would have read something else, or that cannot know it."""
        if not self.is_initialized or self._attachment is not twin._attachment:
            raise KVPruneError(
                f"with_policies: expected a cache that has read something with this model, came "
                f"one that {'belongs to another' if self.is_initialized else 'is empty'}"
            )
        mine, others = (
            [p for p in cache.policies if "rank_hidden" in p.hooks] for cache in (self, twin)
        )
        if mine != others or any("rank_slots" in p.hooks for p in self.policies):
            raise KVPruneError(
                f"with_policies: read with {list(self.policies)!r}, and came "
                f"{list(twin.policies)!r}: expected a cache without policies that evict, and the "
                f"same ones that prune hidden states"
            )
        if self._fixed:
            raise KVPruneError(
                f"with_policies: expected a cache that lacks nothing of what was read, came one "
                f"loaded from a file of which {self._fixed} columns were subject to eviction"
            )
        if self._positions is not None or twin._positions is not None:
            raise KVPruneError(
                "with_policies: expected policies that leave positions as they are: positions "
                "inside the cache are part of what was read"
            )
        for (index, layer), (_, wanted) in zip(self.slot_layers(), twin.slot_layers(), strict=True):
            if not set(wanted.names) <= set(layer.names):
                raise KVPruneError(
                    f"with_policies: {list(twin.policies)!r} needs {list(wanted.names)} at layer "
                    f"{index}, which was not observed: read with ComposedCache(observe="
                    f"{wanted.names!r})"
                )

    @torch.no_grad()
    def _evict_all(self) -> None:
        """Asks the policies at every layer, as at the end of a forward of all that was seen."""
        assert self._rows is not None and self._attachment is not None
        columns = torch.arange(self.seen, device=self._rows.first.device)
        columns = columns.expand(self.batch_size, -1)
        if self._padding is not None:
            hidden = torch.nn.functional.pad(
                self._padding, (0, self.seen - self._padding.shape[1]), value=False
            )
            columns = columns.masked_fill(hidden, -1)
        new = Arrival(columns, self._padding is None, self._padding, self._rows, False)
        asked = torch.zeros_like(columns, dtype=torch.bool)
        group = self._attachment.group
        step = Step(self._working, len(self), 0, new, asked, group=group)
        for index, layer in self.slot_layers():
            step.evict(step.at_layer(index, layer))

    def _bind_to(self, model: torch.nn.Module, what: str) -> Any:
        """Ties the cache to an attached model outside a forward; its base model."""
        inner = unwrapped(model)
        base: Any = base_of(inner) if hasattr(inner, "base_model") else inner
        attachment = getattr(base, "__dict__", {}).get("_kvprune")
        if attachment is None:
            raise KVPruneError(
                f"{what}: expected a model that kvprune is attached to, came "
                f"{type(model).__name__}: call kvprune.attach(model) first"
            )
        self.bind(attachment, base)
        return base

    # What transformers asks of a cache.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new keys and values and returns all that the layer then holds.

        Raises:
            KVPruneError: called outside a forward of an attached model.
        """
        if self.step.one_by_one:
            # Stored by the attention function, each when its turn comes.
            return key_states, value_states
        return self.at_layer(layer_idx).on(key_states.device).store(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length; the same for all layers, and 0 for those behind the last."""
        return self.seen if layer_idx < len(self.layers) or not self.layers else 0

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """By layer: its keys and values, of the slots that it holds, and its sliding window.

        As `DynamicCache` does; slots come in no order (`columns` has them sorted).
        """
        for layer in self.layers:
            local = getattr(layer, "local", None)
            yield layer.keys, layer.values, None if local is None else torch.tensor(local.size)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The logical length with this forward's tokens, and an offset of 0."""
        self._check_in_forward()
        return self.seen + query_length, OURS

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no maximum."""
        return -1

    @property
    def is_initialized(self) -> bool:
        """Whether anything was stored yet."""
        return any(layer.is_initialized for _, layer in self.slot_layers())

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` takes back all of the last forward, as assisted decoding asks."""
        return self._recording

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward."""
        return -1 if self._rows is None else self._rows.first.shape[0]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was (beam search)."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other."""
        rows = torch.arange(max(self.batch_size, 0))
        self._select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows that `indices` (ints or a bool mask) name."""
        rows = torch.arange(max(self.batch_size, 0), device=indices.device)
        self._select_rows(rows[indices])

    def _select_rows(self, rows: Tensor) -> None:
        self._check_usable()
        if self._rows is None:
            return
        self._settle()
        self._together, self._attended = [], {}
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                layer.select_rows(rows)
            else:
                layer.reorder_cache(rows)
        self._rows = self._rows.select(rows)
        self._read = None if self._read is None else self._read.select(rows)
        if self._positions is not None:
            self._positions.select_rows(rows)
        if self._padding is not None:
            self._padding = self._padding.index_select(0, rows.to(self._padding.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the newest `-tokens_to_remove` columns.

        Raises:
            KVPruneError: a positive number, more than were seen, or what is gone would have
                to come back and was not recorded: after a policy that evicts, where a local
                layer dropped what could no longer be seen, or where a layer keeps a state.
        """
        self._check_usable()
        whole = isinstance(tokens_to_remove, int)
        if not whole or tokens_to_remove > 0 or -tokens_to_remove > self.seen:
            raise KVPruneError(
                f"crop({tokens_to_remove!r}): expected minus the number of columns to take back, "
                f"at most {self.seen}"
            )
        back = -tokens_to_remove
        evicts = any("rank_slots" in p.hooks for p in self.policies)
        if back > self._recorded and (evicts or self.seen - back < self._fixed):
            raise KVPruneError(
                f"crop: {self!r} evicts, and what was evicted cannot come back: expected at most "
                f"the {self._recorded} columns of the last forward that were recorded. Call "
                f"activate_past_recording() before a forward that may have to be undone, or take "
                f"a copy.deepcopy of the cache"
            )
        if back > self._recorded and self._observe:
            raise KVPruneError(
                f"crop: what {list(self._observe)} counted of the columns that go cannot be taken "
                f"back: expected at most the {self._recorded} columns that were recorded. Call "
                f"activate_past_recording() first, or take a copy.deepcopy of the cache"
            )
        if back > self._recorded:
            self._check_still_there(self.seen - back)
        self.seen -= back
        self._padding = None if self._padding is None else self._padding[:, : self.seen]
        self._read = None if self._read is None else self._read.until(self.seen)
        recorded, self._pending = self._recorded, 0
        if recorded:
            self._settle(min(back, recorded))
        if back > recorded:
            self._drop_from(self.seen)
            # What was recorded is no prompt.
            self._rows = None if self._rows is None else self._rows.until(self.seen, self._padding)
        for _, layer in self.slot_layers():
            layer.seen = self.seen

    def _drop_from(self, column: int) -> None:
        """Drops what every layer holds of the columns from `column` on."""
        for _, layer in self.slot_layers():
            if layer.is_initialized:
                layer.keep((layer.columns >= 0) & (layer.columns < column))

    def _settle(self, back: int = 0) -> None:
        """Takes back the last `back` recorded columns; the others stay for good."""
        for _, layer in self.slot_layers():
            layer.settle(back)
        self._recorded = 0

    def _check_still_there(self, seen: int) -> None:
        """Refuses to go back to `seen` columns if a local layer dropped what is then in sight."""
        if self._rows is None:
            return
        if self._is_hybrid and seen < self.seen:
            raise KVPruneError(
                f"crop to {seen} columns: the states of the linear-attention layers cannot go "
                f"back. Take a copy.deepcopy of the cache before the forward that may have to be "
                f"undone"
            )
        first = self._rows.first
        for index, layer in self.slot_layers():
            if layer.local is None:
                continue
            gone, wanted = (layer.local.oldest(n, first) for n in (self.seen, seen))
            if bool((gone > wanted.maximum(first)).any()):
                raise KVPruneError(
                    f"crop to {seen} columns: layer {index} sees {layer.local.size} columns and "
                    f"has dropped some that would be in sight again. Take a copy.deepcopy of the "
                    f"cache before the forward that may have to be undone"
                )

    def activate_past_recording(self) -> None:
        """From here on, `crop` can take back what the last forward read beyond the prompt.

        Such tokens, as the drafts of assisted and prompt-lookup decoding, are treated as if
        they came one by one: none is pruned, and every layer evicts after each. Nothing leaves
        its place before the next `crop` or forward. Ends with `generate`, or with `reset()`.
        """
        self._check_usable()
        if self._in_stock_generate and not self._in_generate:
            raise KVPruneError(
                "assisted or prompt-lookup decoding by the generate of a model that kvprune is not "
                "attached to, around one that it is attached to: the whole prompt would count as "
                "drafts. Expected kvprune.attach(model) on the model whose generate is called; or "
                "leave out assistant_model and prompt_lookup_num_tokens"
            )
        self._recording = True

    @property
    def _is_user_defined(self) -> bool:
        """What transformers asks of a cache at the end of `generate`: it is the user's to keep."""
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        # Every `generate` sets this on the cache that it is handed, before anything is read.
        self._in_stock_generate = not self._in_generate

    # What attach() calls, in this order.

    def bind(self, attachment: Attachment, model: torch.nn.Module) -> None:
        """Ties the cache to a model on first use, and makes its layers.

        Raises:
            KVPruneError: the cache failed, it is tied to another model, or a policy cannot work
                on it.
        """
        # Before anything is said of what is handed in: it is the cache that has to go.
        if not self._open:
            self._check_whole()
        if self._attachment is attachment:
            return
        if self._attachment is not None:
            raise KVPruneError(
                f"this cache belongs to another model ({self._attachment.name}): expected the "
                f"object it was first used with, got another ({attachment.name}), or the same one "
                f"after it was detached or its layers were changed. Make a new ComposedCache"
            )
        check_works(self.policies, attachment)
        working = checked([policy.for_model(model) for policy in self.policies])
        layers = range(attachment.num_layers)
        self._positions = positions_for(working, model, attachment.memory)
        given = working, self._observe, self._positions
        self.layers = [new_layer(attachment, i, *given) for i in layers]
        self._working, self._attachment = working, attachment
        self._model = saving.described(model, attachment.memory)

    def announce_prompt(
        self, new: Tensor | int, columns: int, endings: Endings | None = None
    ) -> None:
        """`generate` tells how many valid prompt tokens `[B]` follow, however it splits them.

        Args:
            new: how many.
            columns: of the whole prompt, what was seen before included.
            endings: what watches for rows that end; None where nobody does.
        """
        self._check_usable()
        self._promise, self._prompt_end, self._endings = new, columns, endings

    def enter_generate(self, custom: bool = False) -> None:
        """From here on, what follows an announced prompt does not count as prompt.

        Args:
            custom: whether it runs a function of the user's (`custom_generate`), in which there may
                be another `generate`.

        Raises:
            KVPruneError: the cache is in use or failed.
        """
        self._check_usable()
        # Two threads cannot both enter.
        self._claim()
        try:
            outer = self._generates[-1] if self._generates else None
            if outer is not None and not (outer.custom and outer.thread == _this_thread()):
                raise self._in_use("generate")
            before = self.seen, self._promise, self._prompt_end, self._endings, self._recording
            self._generates.append(_Generate(_this_thread(), custom, *before))
        finally:
            del self._open["step"]
        self._prompt_end, self._endings = 0, None
        # What was read before is not for this `generate` to take back.
        self._pending = 0

    def leave_generate(self) -> None:
        """`generate` is over, however it ended; drafts left in the air were never read."""
        if self._pending and not self._failure and not self._open:
            self.crop(-self._pending)
        if self._generates:
            over = self._generates.pop()
            # What one around it promised has come in, if anything has.
            self._promise = over.promise if over.seen == self.seen else 0
            self._prompt_end, self._endings = over.prompt_end, over.endings
        # Drafts are of a loop of one's own, or of the one whose they were.
        self._recording = self._in_generate and over.recording
        if not self._failure and not self._recording:
            self._settle()

    def check_prompt_ids(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """Refuses ids that are not those of the prompt that was read; see `PromptIds`.

        Args:
            ids: `[B, n]`, all tokens so far and new ones.
            mask: `[B, n]`, 0 for padding; None for none.

        Raises:
            KVPruneError: they differ where neither is padding.
        """
        if self._read is None:
            return
        hidden = [] if self._padding is None else [self._padding]
        hidden += [] if mask is None else [mask == 0]
        found = self._read.difference(ids, hidden)
        if found is None:
            return
        rows, column = found
        raise KVPruneError(
            f"the prompt is not the one that this cache has read: its ids differ in rows {rows}, "
            f"first at column {column} of the {self.seen} seen so far. Expected all tokens so far "
            f"and new ones. Use a new ComposedCache, or cache.reset(), for another prompt"
        )

    def ask_logits(self, logits_to_keep: int | Tensor | None) -> None:
        """Which tokens' logits this thread's next forward is asked for; those are not pruned.

        None takes it back.
        """
        if logits_to_keep is None:
            self._logits_to_keep.pop(_this_thread(), None)
        else:
            self._logits_to_keep[_this_thread()] = logits_to_keep

    @property
    def _in_generate(self) -> bool:
        return bool(self._generates)

    def open_step(self, rows: int, count: int, mask: Tensor | None, device: torch.device) -> None:
        """Begins a forward of `[rows, count]` tokens.

        Args:
            rows: B.
            count: Q.
            mask: padding mask `[B, seen + Q]`, None for no padding, or a 4-D mask that the
                user gave, `[1|B, 1|Hq, Q, seen + Q]`.
            device: where the tokens are.

        Raises:
            KVPruneError: the cache is in use or failed, there are no tokens, the batch size
                changed, the mask does not fit or pads a first prompt on the right. Nothing has
                changed then.
        """
        self._check_usable()
        self._claim()
        try:
            step = self._new_step(rows, count, mask, device)
        except BaseException:
            del self._open["step"]
            raise
        step.read = self._read
        self._open["step"] = (_this_thread(), step)
        self._in_stock_generate = False
        try:
            self._make_way(step)
        except BaseException:
            self._failure = "an error came at the beginning of a forward"
            del self._open["step"]
            raise

    def _make_way(self, step: Step) -> None:
        """What a forward does to slots before its layers run."""
        if step.padding is not self._padding:
            self._hide(step.padding)
        if self._is_hybrid and self.seen and not step.complete:
            step.states = [state for layer in self.layers for state in _states(layer)]
        if step.count == 1 and not step.one_by_one:
            for joint in self._together:
                joint.let_in(step.columns_on(joint.columns.device)[1])

    def note_ids(self, ids: Tensor) -> None:
        """What is read as prompt in the forward that has begun, for `check_prompt_ids`.

        Args:
            ids: its tokens, `[B, Q]`.
        """
        step = self.step
        if self._prompt_end:
            # What is behind the prompt was generated, or are drafts.
            count = min(step.count, self._prompt_end - self.seen)
        else:
            count = 0 if step.count == 1 or self._recording else step.count
        if count <= 0 or torch.compiler.is_compiling():
            return
        before = PromptIds.none(ids.shape[0]) if self._read is None else self._read
        columns = None if step.complete else step.columns[:, :count]
        step.read = before.followed(self.seen, ids[:, :count], columns)

    def _new_step(self, rows: int, count: int, mask: Tensor | None, device: torch.device) -> Step:
        self._check_size(rows, count)
        assert self._attachment is not None
        self._follow(device)
        new = self._arrival(rows, count, mask, device)
        drafts = min(count, max(self.seen + count - self._prompt_end, 0)) * self._recording
        self._check_records(drafts)
        if self._positions is not None:
            self._positions.check(self._rows, new.rows, self.seen)
        # Of a prompt with drafts behind it, what it would be asked for without them.
        keep = 1 if drafts else self._logits_to_keep.get(_this_thread(), 0)
        lead = None if new.complete else new.columns[:, : count - drafts]
        asked = asked_tokens(keep, rows, count - drafts, device, lead)
        self._settle()
        position_ids = None
        if self._positions is not None:
            layers = [layer for _, layer in self.slot_layers()]
            position_ids = self._positions.open(layers, new.columns, new.padding, new.rows)
        return Step(
            self._working,
            len(self),
            self.seen,
            new,
            asked,
            drafts,
            one_by_one=drafts > 0 and (self._drops or bool(self._observe)),
            group=self._attachment.group,
            inside=self._positions,
            position_ids=position_ids,
        )

    def _follow(self, device: torch.device) -> None:
        """What is held of the rows goes to where a forward's tokens are, if it is elsewhere."""
        if self._rows is None or self._rows.first.device == device:
            return
        self._rows = self._rows.on(device)
        self._padding = None if self._padding is None else self._padding.to(device)

    def _arrival(self, rows: int, count: int, mask: Tensor | None, device: torch.device) -> Arrival:
        """What a forward of `[rows, count]` tokens brings; refuses a mask that does not fit."""
        assert self._attachment is not None
        if self._past_prompt and (mask is None or mask.dim() == 2):
            # It goes on with ones.
            mask = self._mask_of_ended(rows, count, device)
        heads = self._attachment.num_heads
        # Whoever pads a first prompt on the right reads the logits of padding next. Later on, a
        # row may pause, and the chunks of an announced prompt, which were looked at, may end so.
        may_end_in_padding = self.seen > 0 or self._prompt_end > 0
        columns = new_columns(rows, count, self.seen, mask, heads, may_end_in_padding, device)
        complete = mask is None or mask.dim() == 4 or bool((columns >= 0).all())
        padding = padding_so_far(self._padding, columns, self.seen, mask)
        if self._is_hybrid:
            self._check_states(columns, complete, padding)
        # What counts as prompt: what `generate` promised, or any forward of several tokens.
        # Not what may be taken back.
        counts = count > 1 and not self._prompt_end and not self._recording
        added = (columns >= 0).sum(-1) if counts else self._promise
        same = padding is self._padding
        numbers = rows_after(self._rows, columns, added, padding, same)
        return Arrival(columns, complete, padding, numbers, numbers is self._rows)

    def _mask_of_ended(self, rows: int, count: int, device: torch.device) -> Tensor | None:
        """A mask `[B, seen + 1]` that hides what `generate` appends to rows that have ended.

        None while no row has ended, or where that is not known.
        """
        padded = None if self._endings is None else self._endings.padded
        if padded is None or count > 1 or padded.shape[0] != rows:
            return None
        mask = torch.ones(rows, self.seen + 1, dtype=torch.bool, device=device)
        mask[:, -1] = ~padded.to(device)
        return mask

    def _check_records(self, drafts: int) -> None:
        """Refuses drafts on a model that cannot take them back."""
        assert self._attachment is not None
        if drafts and self._attachment.cannot_record and (self._drops or self._is_hybrid):
            raise KVPruneError(
                f"assisted decoding and recording with {self.policies!r} on "
                f"{self._attachment.name} are refused: {self._attachment.cannot_record}; leave out "
                f"assistant_model and prompt_lookup_num_tokens"
            )

    @property
    def _past_prompt(self) -> bool:
        """Whether `generate` has handed in its whole prompt."""
        return 0 < self._prompt_end <= self.seen

    def _check_states(self, columns: Tensor, complete: bool, padding: Tensor | None) -> None:
        """Refuses what layers that keep a state cannot do, with new tokens `[B, Q]`."""
        rows, count = columns.shape
        pruners = [p for p in self.policies if "rank_hidden" in p.hooks]
        if pruners and rows > 1 and count > 1 and self.seen:
            raise KVPruneError(
                f"{pruners[0]!r}: a later forward of several tokens in {rows} rows. Rows lose "
                f"different numbers of tokens, which the states of this model's linear-attention "
                f"layers cannot follow then. Use one row per cache, or hand in the prompt at once"
            )
        if padding is not self._padding and bool(self._newly_hidden(padding).any()):
            raise KVPruneError(
                "attention_mask hides columns that this model's linear-attention layers have "
                "taken into their states: expected a mask that keeps what it showed before"
            )
        if complete or self._rows is None or count == 1:
            return
        here = columns >= 0
        began = (self._rows.first < self.seen).to(here.device)
        # Zeros that a first token follows change no state; behind one they do.
        behind = here.any(-1) & (began & ~here.all(-1) | ~began & (here.int().diff() < 0).any(-1))
        if bool(behind.any()):
            raise KVPruneError(
                f"padding beside new tokens in rows {behind.nonzero().flatten().tolist()}, which "
                f"have tokens before: the states of this model's linear-attention layers cannot "
                f"skip it. Expected, in a later forward, rows whose new tokens are all padding or "
                f"all none. Use one row per cache, or a new cache for all tokens"
            )

    def _claim(self) -> None:
        """Takes the one place for a step, or for a copy, or refuses."""
        mine = (_this_thread(), None)
        if self._open.setdefault("step", mine) is not mine:
            raise self._in_use()

    def _hide(self, padding: Tensor | None) -> None:
        """Drops slots that a later mask hides, as a chat does with what follows eos."""
        new = self._newly_hidden(padding)
        if not bool(new.any()):
            return
        for _, layer in self.slot_layers():
            shape = (*layer.columns.shape[:2], -1)
            here = new.to(layer.columns.device)[:, None].expand(shape)
            hidden = here.gather(-1, layer.columns.clamp(min=0))
            layer.keep((layer.columns >= 0) & ~hidden, loses=False)

    def _newly_hidden(self, padding: Tensor | None) -> Tensor:
        """Which of the columns seen so far a forward's mask is the first to hide, `[B, seen]`."""
        assert padding is not None
        new = padding[:, : self.seen].clone()
        if self._padding is not None:
            new[:, : self._padding.shape[1]] &= ~self._padding
        return new

    @property
    def step(self) -> Step:
        """The forward that is under way.

        Raises:
            KVPruneError: there is none, so the model is not attached.
        """
        self._check_in_forward()
        step = self._open["step"][1]
        assert step is not None
        return step

    @property
    def attends_in_pieces(self) -> bool:
        """Whether the next forward never has its attention probabilities as a whole."""
        observes = any(layer.names for _, layer in self.slot_layers())
        return observes or (self._recording and self._drops)

    @property
    def _drops(self) -> bool:
        """Whether layers drop slots that were stored: by a policy, or out of sight."""
        local = any(layer.local is not None for _, layer in self.slot_layers())
        return local or any("rank_slots" in p.hooks for p in self.policies)

    def hand_out(self, layer: int) -> LayerStep:
        """`at_layer`, for an attention function that has to be called with it."""
        self.step.unattended += 1
        return self.at_layer(layer)

    def at_layer(self, layer: int) -> LayerStep:
        """What the attention function of `layer` needs to know."""
        return self.step.at_layer(layer, self._slots(layer))

    def close_step(self, done: bool) -> None:
        """Ends the forward that this thread began, if it did.

        After an error inside (`done=False`) layers may be out of step with each other, so
        the cache refuses to be used until `reset()`.
        """
        owner, step = self._open.get("step", (0, None))
        if step is None or owner != _this_thread():
            return
        self._failure = "an error ended a forward in its middle"
        try:
            if done:
                self._take_over(step)
                self._failure = ""
        finally:
            del self._open["step"]
            step.let_go()

    def _take_over(self, step: Step) -> None:
        """What a forward that reached its end leaves."""
        self._together = step.finish(self._together)
        self._hold_states(step)
        self.seen += step.count
        self._rows, self._padding, self._read = step.rows, step.padding, step.read
        self._promise = 0
        self._attended = step.attended or {}
        self._recorded = step.drafts if step.one_by_one else 0
        self._pending = step.drafts

    def _hold_states(self, step: Step) -> None:
        """Rows that were handed padding alone keep the states that they had."""
        for states, key, before in step.states:
            still = (step.tokens < 0).all(-1).to(before.device)
            shape = (-1,) + (1,) * (before.dim() - 1)
            states[key] = torch.where(still.view(shape), before, states[key])

    def _check_size(self, rows: int, count: int) -> None:
        if self._rows is not None and self.batch_size != rows:
            raise KVPruneError(
                f"the batch size changed: expected {self.batch_size} rows as before, came "
                f"{rows}. Use a new cache, or batch_repeat_interleave / batch_select_indices"
            )
        if count == 0:
            raise KVPruneError("a forward of no tokens: expected at least one new token")

    def _slots(self, layer: int) -> SlotLayer:
        if not -len(self) <= layer < len(self):
            raise KVPruneError(f"layer {layer}: expected a layer of 0 to {len(self) - 1}")
        found = self.layers[layer]
        if not isinstance(found, SlotLayer):
            raise KVPruneError(f"layer {layer} holds no slots: it is a linear-attention layer")
        return found

    def slot_layers(self) -> Iterator[tuple[int, SlotLayer]]:
        """The layers that hold slots, which is all of them but in hybrid models."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SlotLayer):
                yield index, layer

    @property
    def _is_hybrid(self) -> bool:
        return not all(isinstance(layer, SlotLayer) for layer in self.layers)

    def _check_in_forward(self) -> None:
        if "step" not in self._open:
            raise KVPruneError(
                "this cache is in no forward of a model that kvprune is attached to: expected "
                "kvprune.attach(model) first, and then a call of that model or its generate"
            )

    def _check_usable(self) -> None:
        self._check_idle()
        self._check_whole()

    def _check_whole(self) -> None:
        if self._failure:
            raise KVPruneError(
                f"this cache cannot be used any more: {self._failure}, and its layers may hold "
                f"different tokens. Call cache.reset() and hand in the prompt again"
            )

    def _check_idle(self) -> None:
        if self._open:
            raise self._in_use()

    def _in_use(self, what: str = "forward") -> KVPruneError:
        return KVPruneError(
            f"this cache is in the middle of a {what}: expected one {what} at a time. Wait until "
            f"it is over, or use one cache per sequence (copy.deepcopy makes more)"
        )


def _this_thread() -> int:
    # Unknown to compiled code, which is of one thread.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _states(layer: SlotLayer | LinearAttentionLayer) -> Iterator[tuple[Any, int, Tensor]]:
    """A linear-attention layer's states: where each is, and a copy of it."""
    if not isinstance(layer, SlotLayer):
        for states in (layer.conv_states, layer.recurrent_states):
            for key, state in states.items():
                if state is not None:
                    yield states, key, state.clone()


def _tensors(layer: SlotLayer | LinearAttentionLayer) -> Iterator[Tensor]:
    """All that a layer holds."""
    if isinstance(layer, SlotLayer):
        yield from layer.tensors()
        return
    states = (*layer.conv_states.values(), *layer.recurrent_states.values())
    yield from (state for state in states if state is not None)
