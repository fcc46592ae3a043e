"""Results on disk: the file that holds them, and the digests that tell them from other results."""
