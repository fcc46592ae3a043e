"""SDTP: Saliency-driven Dynamic Token Pruning (arXiv 2504.04514v2)."""

from .heads import SDTPHeads
from .policy import SDTP

__all__ = ["SDTP", "SDTPHeads"]
