"""Saliency: learned scores of a prompt's tokens decide what the cache keeps."""

from .heads import SaliencyHeads
from .policy import Saliency

__all__ = ["Saliency", "SaliencyHeads"]
