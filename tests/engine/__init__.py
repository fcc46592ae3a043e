"""Tests of `kvprune.engine`."""
