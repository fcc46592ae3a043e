"""Tests of `kvprune.wiring`."""
