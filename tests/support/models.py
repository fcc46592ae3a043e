"""The tiny models of `kvprune.testing`, which packages of their own test with too."""

from kvprune.testing.models import (
    FAMILIES,
    LAYERS,
    VOCAB,
    ExactRMSNorm,
    ExactRotary,
    _exact,
    fresh_model,
    left_padded,
    plain_model,
    positions,
    prompt,
    tiny_config,
    tiny_model,
)

__all__ = [
    "FAMILIES",
    "LAYERS",
    "VOCAB",
    "ExactRMSNorm",
    "ExactRotary",
    "_exact",
    "fresh_model",
    "left_padded",
    "plain_model",
    "positions",
    "prompt",
    "tiny_config",
    "tiny_model",
]
