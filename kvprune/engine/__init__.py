"""One forward, and one layer's part of it."""
