"""DuoAttention (arXiv 2410.10819)."""

from .measure import head_scores
from .policy import DuoAttention
from .scores import HeadScores

__all__ = ["DuoAttention", "HeadScores", "head_scores"]
