"""The strategy interface: what a policy sees, and what it answers.

Shapes, here and everywhere: B rows, Q tokens of this forward, S slots, Hkv key/value
heads, D head size, C hidden size. A *column* is a token's index in its row's sequence,
padding included; it never changes. A *slot* is a place in one layer's cache.
"""

from .around import Around
from .base import TokenPolicy, check_positions
from .budget import Budget, Lengths, newest, split_share
from .one_budget import OneBudget
from .pooling import check_kernel, pooled
from .rotary import Rotary
from .selection import Ranking, select
from .sharing import best_of_all, best_of_layers
from .views import SlotView, TokenView
from .window import check_context, check_window

__all__ = [
    "Around",
    "Budget",
    "Lengths",
    "OneBudget",
    "Ranking",
    "Rotary",
    "SlotView",
    "TokenPolicy",
    "TokenView",
    "best_of_all",
    "best_of_layers",
    "check_context",
    "check_kernel",
    "check_positions",
    "check_window",
    "newest",
    "pooled",
    "select",
    "split_share",
]
