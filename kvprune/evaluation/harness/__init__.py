"""lm-evaluation-harness with the model `kvprune`."""
