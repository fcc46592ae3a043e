"""Tests of `kvprune.cache`."""
