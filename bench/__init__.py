"""Measurements; most results are kept as JSON in bench/results."""
