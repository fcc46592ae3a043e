"""Tests of `kvprune.attention`."""
