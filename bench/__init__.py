"""Measurements; results are kept beside the scripts as JSON."""
