"""The measurements of `bench.speed`, and the tables that `bench.performance` makes of them."""
