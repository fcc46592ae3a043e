"""Statistics: what policies can have observed; see `Statistic` for one of your own."""

from .attention import Attention, Views
from .base import Block, Statistic, check_statistics, parts_of, statistic_dtype
from .moments import QueryMoments
from .queries import Queries

__all__ = [
    "Attention",
    "Block",
    "Queries",
    "QueryMoments",
    "Statistic",
    "Views",
    "check_statistics",
    "parts_of",
    "statistic_dtype",
]
