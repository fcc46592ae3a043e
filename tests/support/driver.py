"""The driver of `kvprune.testing`, which packages of their own test with too."""

from kvprune.testing.driver import D, Driver, Oracles, Tokens, check_each_step

__all__ = ["D", "Driver", "Oracles", "Tokens", "check_each_step"]
