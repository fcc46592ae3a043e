"""Readings of prompts, and what they cost."""
