"""Statistics: what policies can have observed; see `Statistic` for one of your own."""

from .attention import Attention, Views
from .base import Block, Statistic, check_statistics, parts_of, statistic_dtype
from .gate import Gate
from .moments import QueryMoments, Rotations
from .queries import Queries
from .second_reading import SecondReading, Votes
from .survival import Survival

__all__ = [
    "Attention",
    "Block",
    "Gate",
    "Queries",
    "QueryMoments",
    "Rotations",
    "SecondReading",
    "Statistic",
    "Survival",
    "Views",
    "Votes",
    "check_statistics",
    "parts_of",
    "statistic_dtype",
]
