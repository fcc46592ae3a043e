"""Measurements: readings of prompts, and their costs."""
