"""Tests of `kvprune.positions`."""
