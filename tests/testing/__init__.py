"""Tests of `kvprune.testing`."""
