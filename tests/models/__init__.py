"""Tests of `kvprune.models`."""
