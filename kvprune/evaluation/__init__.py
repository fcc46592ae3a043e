"""Comparisons of policies with the dense model: plans, runs, measurements, tasks and reports."""
