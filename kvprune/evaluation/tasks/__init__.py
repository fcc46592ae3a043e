"""What a comparison asks of a model: one task, one file. `base` says what a task is."""
