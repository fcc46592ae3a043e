"""Tests of `kvprune.policy`."""
