"""The cache: what it holds, what `generate` tells it, and its file."""
