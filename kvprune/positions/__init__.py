"""Positions inside the cache."""
