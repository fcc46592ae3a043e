"""Results on disk: what is written, and what tells it from other results."""
