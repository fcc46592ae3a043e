"""SDTP: Saliency-driven Dynamic Token Pruning (arXiv 2504.04514v2)."""

from .examples import Example, read_examples, sharing
from .heads import SDTPHeads
from .options import Training
from .policy import SDTP
from .saliency import saliency
from .shipped import fingerprint
from .training import train, untrained

__all__ = [
    "SDTP",
    "Example",
    "SDTPHeads",
    "Training",
    "fingerprint",
    "read_examples",
    "saliency",
    "sharing",
    "train",
    "untrained",
]
