"""A comparison: what is planned, who runs the cells, and what one cell does."""
