"""The side of a cache that transformers sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..attention.masks import OURS
from ..engine.layer_step import LayerStep, at_layer
from ..engine.step import Step
from ..errors import KVPruneError
from ..models.devices import in_memory
from ..policy.base import TokenPolicy
from ..policy.composition import evicts
from ..statistics import Statistic
from ..storage.layer import SlotLayer
from ..storage.quantized import Quantized
from .binding import Binding
from .evictions import Eviction, Watch
from .guard import Guard
from .session import Session
from .state import CacheState


class StockCache(Cache):
    """A cache that does what transformers asks of one; `ComposedCache` is the one that users make.

    `step` and `at_layer`, which attached models call as well, stand here, as `update` needs them.

    Args:
        policies: a pipeline, checked.
        observe: statistics that are observed though no policy wants them, checked.
        store: how keys and values are held; None for as the model made them.

    Attributes:
        policies: see above.
        observe: see above.
        store: see above.
        state: what is held.
        session: what `generate` has said.
        guard: who uses the cache.
        binding: the model that the cache is tied to; None before its first use.
    """

    layers: list[Any]  # SlotLayer, or LinearAttentionLayer in hybrid models

    def __init__(
        self,
        policies: tuple[TokenPolicy, ...],
        observe: tuple[Statistic, ...],
        store: Quantized | None,
    ) -> None:
        super().__init__(layers=[])
        self.policies, self.observe, self.store = policies, observe, store
        self._on_evict: Callable[[Eviction], None] | None = None
        self._begin()

    def _begin(self) -> None:
        """Sets all that is not the user's choice, as in a cache that nothing was done with."""
        self.binding: Binding | None = None
        self.session = Session()
        self.guard = Guard()
        self._watch = Watch()
        self._hold(CacheState([]))

    def _hold(self, state: CacheState) -> None:
        """Takes over layers, and what is known of rows."""
        # transformers looks for `layers` on the cache itself: both must stay one list.
        self.state, self.layers = state, state.layers

    @property
    def on_evict(self) -> Callable[[Eviction], None] | None:
        """Who is told what each forward evicted; None for nobody.

        Raises:
            KVPruneError: when it is set, to what cannot be called.
        """
        return self._on_evict

    @on_evict.setter
    def on_evict(self, told: Callable[[Eviction], None] | None) -> None:
        if told is not None and not callable(told):
            raise KVPruneError(
                f"on_evict: expected what can be called with a kvprune.Eviction, or None, got "
                f"{told!r}"
            )
        self._on_evict = told

    @property
    def seen(self) -> int:
        """Columns shown so far, padding included: the logical length."""
        return self.state.seen

    def slot_layers(self) -> Iterator[tuple[int, SlotLayer]]:
        """The layers that hold slots, each with its index: all of them but in hybrid models."""
        return self.state.slot_layers()

    def __len__(self) -> int:
        return len(self.layers)

    def __bool__(self) -> bool:
        # A cache that has no layers yet is not "no cache".
        return True

    @property
    def step(self) -> Step:
        """The forward that is under way.

        Raises:
            KVPruneError: there is none, so the model is not attached.
        """
        return self.guard.step

    def at_layer(self, layer: int) -> LayerStep:
        """The forward that is under way at a layer, for the layer's attention."""
        return at_layer(self.step, layer, self.state.slots(layer))

    def _tell_evictions(self) -> None:
        """Tells `on_evict` what went since the last forward began, once, if anybody listens."""
        if self.on_evict is not None:
            for each in self._watch.untold(self.state):
                self.on_evict(each)

    # What transformers asks of a cache.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new keys and values and returns all that the layer then holds.

        Raises:
            KVPruneError: called outside a forward of an attached model.
        """
        step = self.step
        if step.one_by_one:
            # Stored by the attention function, each when its turn comes.
            return key_states, value_states
        layer = at_layer(step, layer_idx, self.state.slots(layer_idx))
        return layer.on(key_states.device).store(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length; the same for all layers, and 0 for those behind the last."""
        return self.seen if layer_idx < len(self.layers) or not self.layers else 0

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and sliding window of each layer, of the slots that it holds.

        As `DynamicCache` does; slots come in no order (`columns` has them sorted).
        """
        for layer in self.layers:
            local = getattr(layer, "local", None)
            yield layer.keys, layer.values, None if local is None else torch.tensor(local.size)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The logical length with this forward's tokens, and an offset of 0."""
        self.guard.check_in_forward()
        return self.seen + query_length, OURS

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no maximum."""
        return -1

    @property
    def is_initialized(self) -> bool:
        """Whether anything was stored yet."""
        return self.state.is_initialized

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` takes back all of the last forward, as assisted decoding asks."""
        return self.session.recording

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward."""
        return self.state.batch_size

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was (beam search).

        Raises:
            KVPruneError: numbers that are no rows of the cache, or a tensor of another kind.
        """
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other."""
        rows = torch.arange(max(self.batch_size, 0))
        self._select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows that `indices` (ints or a bool mask) name.

        Raises:
            KVPruneError: `indices` are no tensor, or name rows that are not there.
        """
        count = max(self.batch_size, 0)
        try:
            rows = torch.arange(count, device=indices.device)[indices]
        except (AttributeError, IndexError) as error:
            got = list(indices.shape) if isinstance(indices, Tensor) else type(indices).__name__
            raise KVPruneError(
                f"batch_select_indices: expected a tensor of numbers of the cache's {count} rows, "
                f"or a bool mask [{count}], got {got}: {error}"
            ) from error
        self._select_rows(rows)

    def _select_rows(self, rows: Tensor) -> None:
        self.guard.check_usable()
        if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
            raise KVPruneError(
                f"rows of a cache: expected their numbers, an int64 tensor [rows], got "
                f"{rows.dtype} of shape {list(rows.shape)}"
            )
        count = self.batch_size
        # Elsewhere nobody waits for the device.
        if count >= 0 and rows.numel() and in_memory(rows):
            least, most = (int(end) for end in rows.aminmax())
            if least < 0 or most >= count:
                raise KVPruneError(
                    f"rows of a cache: expected numbers of its {count} rows, from 0, got {least} "
                    f"to {most}. batch_repeat_interleave makes more rows"
                )
        self.state.join_waiting()
        with self.guard.moving("a selection of rows"):
            self.state.select_rows(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the newest `-tokens_to_remove` columns.

        Raises:
            KVPruneError: a positive number, more than were seen, or what is gone would have
                to come back and was not recorded: after a policy that evicts, where a local
                layer dropped what could no longer be seen, or where a layer keeps a state.
        """
        self.guard.check_usable()
        whole = isinstance(tokens_to_remove, int)
        if not whole or tokens_to_remove > 0 or -tokens_to_remove > self.seen:
            raise KVPruneError(
                f"crop({tokens_to_remove!r}): expected minus the number of columns to take back, "
                f"at most {self.seen}"
            )
        back, state = -tokens_to_remove, self.state
        drops = evicts(self.policies) or self.seen - back < state.fixed
        if back > state.recorded and drops:
            raise KVPruneError(
                f"crop: what {list(self.policies)!r} evicted cannot come back: expected at most "
                f"the {state.recorded} columns of the last forward that were recorded. Call "
                f"activate_past_recording() before a forward that may have to be undone, or take "
                f"a copy.deepcopy of the cache"
            )
        if back > state.recorded and self.observe:
            raise KVPruneError(
                f"crop: what {list(self.observe)} counted of the columns that go cannot be taken "
                f"back: expected at most the {state.recorded} columns that were recorded. Call "
                f"activate_past_recording() first, or take a copy.deepcopy of the cache"
            )
        if back > state.recorded:
            state.check_still_there(self.seen - back)
        self.session.pending = 0
        with self.guard.moving("a crop"):
            state.take_back(back)
        self._tell_evictions()

    def activate_past_recording(self) -> None:
        """Lets `crop` take back, from here on, what the last forward read beyond the prompt.

        Such tokens, as the drafts of assisted and prompt-lookup decoding, are treated as if
        they came one by one: none is pruned, and every layer evicts after each. Nothing leaves
        its place before the next `crop` or forward. Ends with `generate`, or with `reset()`.
        """
        self.guard.check_usable()
        if self.session.in_stock_generate and not self.session.in_generate:
            raise KVPruneError(
                "assisted or prompt-lookup decoding by the generate of a model that kvprune is not "
                "attached to, around one that it is attached to: the whole prompt would count as "
                "drafts. Expected kvprune.attach(model) on the model whose generate is called; or "
                "leave out assistant_model and prompt_lookup_num_tokens"
            )
        self.session.recording = True

    @property
    def _is_user_defined(self) -> bool:
        """True: the cache is the user's to keep. transformers asks at the end of `generate`."""
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        # Every `generate` sets this on the cache that it is handed, before anything is read.
        self.session.in_stock_generate = not self.session.in_generate
