"""The naive selection of `kvprune.testing`, which packages of their own test with too."""

from kvprune.testing.naive import naive_select

__all__ = ["naive_select"]
