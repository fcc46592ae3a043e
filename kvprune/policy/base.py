"""TokenPolicy: the base of all policies."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from ..errors import KVPruneError
from ..statistics import Statistic, parts_of
from .moment import Moment
from .selection import Ranking
from .views import SlotView, TokenView

if TYPE_CHECKING:
    from .composition import Union


HOOKS = ("rank_hidden", "rank_slots", "rank_layers")


@dataclass(frozen=True, eq=False, repr=False)
class TokenPolicy:
    """Base of all policies: override a hook, or one for each place; one left out keeps everything.

    A policy with no hook, or with a misspelt one, is refused by the cache that it is handed to.

    A policy only ranks. It is configuration: it holds no state and no tensors of a
    sequence, so one object serves any number of caches and threads. Subclasses may be
    frozen dataclasses or ordinary classes; `layers` restricts any policy to some layers
    (counted from 0; None means all).

    `when` says in which forwards slots are ranked. None: in every one. "prompt": in the one that
    ends a prompt, in each turn. "first": at the end of the first prompt alone. A number n: at the
    end of each prompt, and whenever another n columns have come since. A prompt ends where
    `generate` says, or `with cache.prompt(lengths)`; in a loop of one's own, a forward of several
    tokens that was not announced is a prompt by itself. A subclass that has another default says
    `when: int | str | None = field(default="prompt", kw_only=True)`. An ordinary class with an
    `__init__` of its own hands both on with `super().__init__(layers=layers, when=when)`.

    Class attributes:
        statistics: a tuple of what the policy wants observed, as `statistics = (Attention(),)`, or
            a property that depends on options; see `kvprune.statistics`.
        shares_heads: whether its `rank_slots` makes one set for all heads of a layer out of what
            differs between them (statistics, keys, values): the processes of a tensor parallel
            model then take the mean of their scores. What it says of a token must be the same in
            all heads that hold it, where they hold different ones.
        positions_in_cache: whether positions are to be assigned inside the cache, by a slot's place
            among those that are left (see `kvprune.positions.by_slot`), whatever other policies
            want.
        sinks_before_window: what the policy leaves has no gaps but one, behind that many of a row's
            first tokens; None where that is not so. Where it holds for all that evict, positions
            cost less (see `kvprune.positions.sinks`).
        constant_budget: the promise that `rank_slots` gives the same budget in every step, as long
            as the prompt does not grow, and protects no more than it. Once a layer is full, each
            new token then costs one slot, which the engine need not read off the device.
        layers_alike: the promise that `rank_slots` asks nothing of keys, values and `layer`. In
            decoding it may then be asked once for many layers, which come as more rows (see
            `kvprune.storage.group`).
    """

    layers: Collection[int] | None = field(default=None, kw_only=True)
    when: int | str | None = field(default=None, kw_only=True)

    shares_heads = False
    positions_in_cache = False
    sinks_before_window = None  # type: int | None
    constant_budget = False
    layers_alike = False

    def rank_hidden(self, tokens: TokenView) -> Ranking | None:
        """Ranks the hidden tokens before a decoder layer, in forwards of several tokens."""
        return None

    def rank_slots(self, slots: SlotView) -> Ranking | None:
        """Ranks a layer's slots after its attention, in the forwards that `when` says."""
        return None

    def rank_layers(self, layers: Sequence[SlotView]) -> Sequence[Ranking | None] | None:
        """Ranks the slots of all layers at once, after the last one, when `when` says.

        For what compares layers, as one budget for all of them. In place of `rank_slots`: a policy
        has one of the two. Nothing goes before the last layer has attended, and policies behind
        this one in the pipeline are asked after it.

        Args:
            layers: the layers that the policy applies to, in order.

        Returns:
            for each of them a ranking, or None to keep everything; None to keep everything.
        """
        return None

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What the policy wants observed; a class attribute in most policies."""
        return ()

    @property
    def hooks(self) -> frozenset[str]:
        """The names of the hooks that this policy overrides."""
        mine = type(self)
        return frozenset(h for h in HOOKS if getattr(mine, h) is not getattr(TokenPolicy, h))

    @property
    def evicts(self) -> bool:
        """Whether the policy drops slots."""
        return bool(self.hooks & {"rank_slots", "rank_layers"})

    def with_budget(self, share: float) -> TokenPolicy | None:
        """The policy with another budget, as comparisons at one budget need it.

        Args:
            share: of the prompt's slots, what a layer keeps in all, in (0, 1].

        Returns:
            a copy; None where the policy has no budget that could be set, as one that prunes by
            a schedule of its own.

        Raises:
            KVPruneError: not a share.
        """
        return None

    @property
    def fixed_budget(self) -> int:
        """The slots that a layer keeps whatever the prompt's length; 0 where that is a share."""
        return 0

    def for_model(self, model: torch.nn.Module) -> TokenPolicy:
        """The policy that works on `model`: itself, or a copy with what it needs of the model.

        Called once, before a cache with this policy is first used with the model.

        Args:
            model: the model that has the decoder layers, without its head.

        Raises:
            KVPruneError: the policy cannot work on this model.
        """
        return self

    def for_tokenizer(self, tokenizer: Any) -> TokenPolicy:
        """The policy with what it says to the model in words: itself, or a copy.

        The commands of kvprune call it; who makes a cache by hand does so too, where a policy's
        page says so.

        Args:
            tokenizer: the model's, as transformers has it.
        """
        return self

    def applies(self, layer: int) -> bool:
        """Whether the policy ranks at this layer at all."""
        return self.layers is None or layer in self.layers

    def is_due(self, moment: Moment) -> bool:
        """Whether the policy is asked about slots at this moment."""
        return moment.is_due(self.when) and (moment.read_again or not self.reads_again)

    @property
    def reads_again(self) -> bool:
        """Whether the policy goes by a second reading of the prompt; it is asked behind it alone.

        See `SecondReading` in `kvprune.statistics`.
        """
        return any(part.reads == "second reading" for part in parts_of(self.statistics))

    def awaits(self, part: Statistic, moment: Moment) -> bool:
        """Whether a ranking of slots reads a statistic at this moment, or later what is seen now.

        Not beyond the end of this prompt where the policy is asked at ends of prompts.
        """
        return moment.comes(self.when) and part in parts_of(self.statistics)

    def __or__(self, other: TokenPolicy) -> Union:
        """`a | b` keeps what either keeps."""
        from .composition import Union

        return Union.of(self, other)

    def __repr__(self) -> str:
        every = [f for f in fields(self) if f.repr]
        # These two come last, and only where they differ from what the class says.
        last = [f for f in every if f.name in ("layers", "when")]
        own = [f for f in every if f not in last]
        own += [f for f in last if getattr(self, f.name) != f.default]
        values = (f"{f.name}={getattr(self, f.name)!r}" for f in own)
        return f"{type(self).__name__}({', '.join(values)})"


def check_positions(positions: str, name: str) -> None:
    """Refuses what says neither of the two ways in which positions are assigned.

    Raises:
        KVPruneError: not "original" or "cache"; `name`, the policy's, is in the message.
    """
    if positions not in ("original", "cache"):
        raise KVPruneError(
            f"{name}: positions={positions!r}: expected 'original' (those that tokens came with) "
            f"or 'cache' (assigned inside the cache)"
        )
