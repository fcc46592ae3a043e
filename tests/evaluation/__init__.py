"""Tests of `kvprune.evaluation`."""
