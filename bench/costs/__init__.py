"""What `bench.speed` measures, and what `bench.performance` makes of it."""
