"""Slots of layers, and what is known of rows."""
