"""Saliency: learned scores of a prompt's tokens decide what the cache keeps."""

from .heads import SaliencyHeads
from .policy import Saliency
from .training import train_saliency

__all__ = ["Saliency", "SaliencyHeads", "train_saliency"]
