"""The model `kvprune` for lm-evaluation-harness, and reports of its output."""
