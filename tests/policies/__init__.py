"""Tests of `kvprune.policies`."""
