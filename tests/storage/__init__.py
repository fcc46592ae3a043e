"""Tests of `kvprune.storage`."""
