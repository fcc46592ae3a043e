"""A comparison: its plan, the executors that run its cells, and the work on one cell."""
