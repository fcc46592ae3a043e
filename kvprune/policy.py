"""The strategy interface: what a policy sees, and what it answers.

Shapes, here and everywhere: B rows, Q tokens of this forward, S slots, Hkv key/value
heads, D head size, C hidden size. A *column* is a token's index in its row's sequence,
padding included; it never changes. A *slot* is a place in one layer's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import KVPruneError

if TYPE_CHECKING:
    from .composition import Union


@dataclass(frozen=True)
class Ranking:
    """What a policy answers: which tokens matter, and how many may stay.

    score: `[B, 1|Hkv, S]` float, higher stays; ties go to the newer column.
    protected: `[B, 1|Hkv, S]` bool, stays first; where there are more of these than the
        budget has room for, the budget is raised to them.
    budget: `[B]` or `[B, 1|Hkv]` int, how many stay in all, the protected included.

    For hidden tokens S is Q and the head axis is 1.
    """

    score: Tensor
    protected: Tensor
    budget: Tensor


class _Statistics:
    """A view's statistics by name; asking for one that was not named is an error."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values

    def only(self, names: Collection[str]) -> _Statistics:
        """Those that a policy named: what others want is not for it to see."""
        return _Statistics({n: self._values[n] for n in names if n in self._values})

    def values(self) -> Collection[Tensor]:
        """All of them."""
        return self._values.values()

    def __call__(self, name: str) -> Tensor:
        if name not in self._values:
            raise KVPruneError(
                f"statistic {name!r} was not observed here: expected one of "
                f"{sorted(self._values)}. Name it in the policy's class attribute "
                f"`statistics`; before layer 0 there is none."
            )
        return self._values[name]


class _Withheld:
    """Stands for the keys and values of a view whose policy promised not to look at them."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise KVPruneError(
            f"keys and values (.{name}) were asked for by a policy that promises `layers_alike`, "
            f"to rank by what is the same question for every layer: expected layers_alike = False"
        )


WITHHELD: Any = _Withheld()


class Lengths:
    """How many tokens each row has: what a share is a share of.

    Read off the device once, so that no layer and no step waits for it again.

    Args:
        tensor: `[B]` int64.
        ends: its least and its most, where they are known.
    """

    def __init__(self, tensor: Tensor, ends: tuple[int, int] | None = None) -> None:
        self.tensor = tensor
        if ends is None:
            ends = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
        self._ends = ends
        # By an amount's repr: 1 is a token, 1.0 is all of them.
        self._known: dict[str, tuple[Tensor, tuple[int, int]]] = {}
        self._below: dict[int, Lengths] = {}
        self._elsewhere: dict[torch.device, Lengths] = {}

    def on(self, device: torch.device) -> Lengths:
        """The same on a device; for a model on several, once for each."""
        if self.tensor.device == device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Lengths(self.tensor.to(device), self._ends)
        return self._elsewhere[device]

    def tokens(self, amount: int | float) -> Tensor:
        """An amount, as of a `Budget`, in tokens of each row, `[B]` int64; read only."""
        return self._of(amount)[0]

    def below(self, times: int) -> Lengths:
        """Those of the same rows so many times, below each other."""
        if times not in self._below:
            self._below[times] = _Below(self, times)
        return self._below[times]

    def ends(self, amount: int | float) -> tuple[int, int]:
        """The least and the most of `tokens`, without waiting for the device."""
        return self._of(amount)[1]

    def _of(self, amount: int | float) -> tuple[Tensor, tuple[int, int]]:
        if repr(amount) not in self._known:
            budget = Budget(amount, least=0)
            least, most = (budget.of_length(end) for end in self._ends)
            self._known[repr(amount)] = (budget.of(self.tensor), (least, most))
        return self._known[repr(amount)]


class _Below(Lengths):
    """Lengths so many times, below each other; they know of amounts what the first ones know."""

    def __init__(self, lengths: Lengths, times: int) -> None:
        super().__init__(lengths.tensor.repeat(times), lengths._ends)
        self._lengths, self._times = lengths, times

    def _of(self, amount: int | float) -> tuple[Tensor, tuple[int, int]]:
        if repr(amount) not in self._known:
            tokens, ends = self._lengths._of(amount)
            self._known[repr(amount)] = (tokens.repeat(self._times), ends)
        return self._known[repr(amount)]


class _Amounts:
    """What both views say of amounts: an int counts tokens, a float is a share of a row's."""

    lengths: Lengths
    columns: Tensor
    valid: Tensor
    first: Tensor
    begin: Callable[[int], Tensor] | None

    def tokens(self, amount: int | float) -> Tensor:
        """The amount in tokens of each row, `[B]` int64; see `Budget.of`. Read only."""
        return self.lengths.tokens(amount)

    def newest(self, amount: int | float) -> Tensor:
        """Which are among the newest so many: `[B, 1|H, S]` bool, all valid ones if fewer."""
        columns = self.columns if self.columns.dim() == 3 else self.columns[:, None]
        return newest(columns, self.tokens(amount), self.lengths.ends(amount))

    def oldest(self, count: int) -> Tensor:
        """Which are among their row's first so many tokens (sinks): `[B, 1|H, S]` bool.

        Of all that the row was ever handed: those that are gone are not made up for.
        """
        end = self.first + count if self.begin is None else self.begin(count)
        if self.columns.dim() == 3:
            return self.valid & (self.columns < end[:, None, None])
        return (self.valid & (self.columns < end[:, None]))[:, None]


@dataclass(frozen=True)
class TokenView(_Amounts):
    """The hidden tokens about to enter a decoder layer; read only.

    layer, num_layers: this layer (from 0) and how many the model has.
    hidden: `[B, Q, C]`. columns: `[B, Q]` int64, -1 where not valid. valid: `[B, Q]`.
    first: `[B]`, each row's first valid column.
    length: `[B]`, each row's valid tokens in this forward before any pruning.
    tokens(amount): `[B]` int64, tokens (an int) or a share of `length` (a float) as tokens.
    newest(amount): `[B, 1, Q]` bool, which are among the newest so many.
    oldest(count): `[B, 1, Q]` bool, which are among their row's first so many.
    statistic(name): `[B, Hkv, Q]`, what these tokens got in the previous layer, from the
        queries of this forward.
    group: the processes that share the heads of a tensor parallel model (see
        `kvprune.parallel`); None for one alone.
    """

    layer: int
    num_layers: int
    hidden: Tensor
    columns: Tensor
    valid: Tensor
    first: Tensor
    lengths: Lengths = field(repr=False)
    statistic: _Statistics = field(repr=False)
    group: Any = field(default=None, repr=False)
    begin: Callable[[int], Tensor] | None = field(default=None, repr=False)

    @property
    def length(self) -> Tensor:
        """See above."""
        return self.lengths.tensor


@dataclass(frozen=True)
class SlotView(_Amounts):
    """One layer's slots after its attention; read only, in no order.

    layer, num_layers: this layer (from 0) and how many the model has.
    columns: `[B, 1|Hkv, S]` int64, -1 where not valid. valid: the same shape, bool.
    first: `[B]`, each row's first valid column. seen: columns shown so far, this forward
        included. prompt_length: `[B]`, each row's valid prompt tokens, all turns together.
    tokens(amount): `[B]` int64, tokens (an int) or a share of `prompt_length` (a float) as tokens.
    newest(amount): `[B, 1|Hkv, S]` bool, which are among the newest so many.
    oldest(count): `[B, 1|Hkv, S]` bool, which are among their row's first so many.
    keys, values: `[B, Hkv, S, D]`, rotated as the model stores them; withheld from a policy that
        promises `layers_alike`.
    statistic(name): `[B, Hkv, S]`, accumulated since the slot's column was read.
    group: as in `TokenView`; Hkv are then the heads of this process.
    """

    layer: int
    num_layers: int
    columns: Tensor
    valid: Tensor
    first: Tensor
    seen: int
    lengths: Lengths = field(repr=False)
    keys: Tensor
    values: Tensor
    statistic: _Statistics = field(repr=False)
    group: Any = field(default=None, repr=False)
    begin: Callable[[int], Tensor] | None = field(default=None, repr=False)

    @property
    def prompt_length(self) -> Tensor:
        """See above."""
        return self.lengths.tensor


HOOKS = ("rank_hidden", "rank_slots")


@dataclass(frozen=True, eq=False, repr=False)
class TokenPolicy:
    """Base of all policies: override one hook or both; one left out keeps everything.

    A policy only ranks. It is configuration: it holds no state and no tensors of a
    sequence, so one object serves any number of caches and threads. Subclasses may be
    frozen dataclasses or ordinary classes; `layers` restricts any policy to some layers
    (counted from 0; None means all). An ordinary class with an `__init__` of its own hands
    it on with `super().__init__(layers=layers)`.

    Class attribute `statistics` names what the policy wants observed (see
    `kvprune.statistics`). `shares_heads` says that its `rank_slots` makes one set for all heads
    of a layer out of what differs between them (statistics, keys, values): the processes of a
    tensor parallel model then take the mean of their scores. `positions_in_cache` asks for
    positions inside the cache, by a slot's place among those that are left (see
    `kvprune.places`), whatever other policies want; `sinks_before_window` says that what the policy
    leaves has no gaps but one, behind that many of a row's first tokens. Where that holds for all
    that evict, positions cost less (see `kvprune.positions`).
    `constant_budget` promises that `rank_slots` gives the same budget in every step, as long as the
    prompt does not grow, and protects no more than it: once a layer is full, each new token then
    costs one slot, which the engine need not read off the device. `layers_alike` promises that
    `rank_slots` asks nothing of keys, values and `layer`: in decoding it may then be asked once for
    many layers, which come as more rows (see `kvprune.together`).
    """

    layers: Collection[int] | None = field(default=None, kw_only=True)

    statistics = ()  # type: tuple[str, ...]
    shares_heads = False
    positions_in_cache = False
    sinks_before_window = None  # type: int | None
    constant_budget = False
    layers_alike = False

    def rank_hidden(self, tokens: TokenView) -> Ranking | None:
        """Ranks the hidden tokens before a decoder layer, in forwards of several tokens."""
        return None

    def rank_slots(self, slots: SlotView) -> Ranking | None:
        """Ranks a layer's slots after its attention, in every forward."""
        return None

    @property
    def hooks(self) -> frozenset[str]:
        """The names of the hooks that this policy overrides."""
        mine = type(self)
        return frozenset(h for h in HOOKS if getattr(mine, h) is not getattr(TokenPolicy, h))

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

        Called once, before a cache with this policy is first used with `model`.

        Raises:
            KVPruneError: the policy cannot work on this model.
        """
        return self

    def applies(self, layer: int) -> bool:
        """Whether the policy ranks at this layer at all."""
        return self.layers is None or layer in self.layers

    def __or__(self, other: TokenPolicy) -> Union:
        """`a | b` keeps what either keeps."""
        from .composition import Union

        return Union.of(self, other)

    def __repr__(self) -> str:
        own = [
            f for f in fields(self) if f.repr and (f.name != "layers" or self.layers is not None)
        ]
        own.sort(key=lambda f: f.name == "layers")
        values = (f"{f.name}={getattr(self, f.name)!r}" for f in own)
        return f"{type(self).__name__}({', '.join(values)})"


@dataclass(frozen=True)
class Budget:
    """How many tokens: an int counts them, a float in (0, 1] is a share of the prompt.

    Raises:
        KVPruneError: not a number, NaN, negative, a float above 1.0, or less than `least`
            tokens (`least=0` allows a part of 0).
    """

    amount: int | float
    name: str = "budget"
    least: int = 1

    def __post_init__(self) -> None:
        amount: Any = self.amount
        number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        whole = isinstance(amount, int)
        if not number or not (amount >= self.least if whole else self._is_share(amount)):
            zero = ", or 0 to leave this part out" if self.least == 0 else ""
            raise KVPruneError(
                f"{self.name}={amount!r}: expected a number of tokens (an int of at least "
                f"{max(self.least, 1)}) or a share of the prompt (a float above 0.0 and up to "
                f"1.0){zero}"
            )

    def _is_share(self, amount: float) -> bool:
        return 0.0 < amount <= 1.0 or (amount == 0.0 and self.least == 0)

    def of(self, length: Tensor) -> Tensor:
        """The budget in tokens for each row.

        Args:
            length: `[B]` int64, what a share is a share of (a row's prompt length).

        Returns:
            `[B]` int64; a share is rounded to the nearest token, halves up, exact for
            decimal shares (0.2 of 100 is 20), at least 1 unless the part is 0.
        """
        if isinstance(self.amount, int) or self.amount == 0:
            return torch.full_like(length, int(self.amount))
        return _share(self.amount, length).clamp(min=1)

    def of_length(self, length: int) -> int:
        """The budget in tokens for one row of so many."""
        if isinstance(self.amount, int) or self.amount == 0:
            return int(self.amount)
        return max(_share(self.amount, length), 1)


def _share(share: float, length: Any) -> Any:
    part = _fraction(share)
    up, down = part.numerator, part.denominator
    return (2 * up * length + down) // (2 * down)


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


def split_share(share: float, *amounts: int | float) -> tuple[float, ...]:
    """A share of the prompt, split in the proportion of some amounts; exact for decimal shares.

    Amounts of which some are tokens and some are shares have no proportion: parts that are not 0
    are alike then.

    Raises:
        KVPruneError: `share` is not a float in (0, 1].
    """
    if not isinstance(share, float) or not 0.0 < share <= 1.0:
        raise KVPruneError(
            f"with_budget({share!r}): expected a share of the prompt (a float in (0, 1])"
        )
    parts = [_fraction(amount) for amount in amounts]
    if len({type(amount) for amount in amounts if amount}) > 1:
        parts = [Fraction(part != 0) for part in parts]
    return tuple(float(_fraction(share) * part / sum(parts)) for part in parts)


@lru_cache(maxsize=256)
def _fraction(share: float) -> Fraction:
    # The decimal that was typed, not the binary float: 0.1 means 1/10. The bound keeps
    # 2 * numerator * length within int64 for sequences of up to four billion tokens.
    return Fraction(repr(float(share))).limit_denominator(10**9)


def newest(columns: Tensor, count: Tensor, ends: tuple[int, int] | None = None) -> Tensor:
    """Which entries are among the `count` newest.

    Args:
        columns: `[B, H, S]` int64, unique, -1 where not valid.
        count: `[B]` or `[B, 1|H]` int64.
        ends: the least and the most of `count`, where they are known; else they are read, which
            waits for the device.

    Returns:
        `[B, H, S]` bool; all valid entries where there are no more than `count`.
    """
    least, most = torch.stack(count.aminmax()).tolist() if ends is None else ends
    size = columns.shape[-1]
    # Not a sort: in decoding, where S is a budget, topk takes a fraction of its time.
    if least == most and 0 < most <= size:
        oldest = columns.topk(most, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        return columns >= oldest.clamp(min=0)
    oldest = columns.topk(min(max(most, 1), size), dim=-1).values
    count = count.reshape(count.shape[0], -1, 1).expand(-1, columns.shape[1], -1)
    oldest = oldest.gather(-1, (count - 1).clamp(min=0, max=oldest.shape[-1] - 1))
    return (columns >= oldest.clamp(min=0)) & (count > 0)
