"""The policies that ship with kvprune: one file, or one folder, for each paper."""

from .h2o import H2O
from .sdtp import SDTP, SDTPHeads
from .streaming_llm import StreamingLLM

__all__ = ["H2O", "SDTP", "SDTPHeads", "StreamingLLM"]
