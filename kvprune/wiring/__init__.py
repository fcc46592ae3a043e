"""The wiring of a model: forwards, hooks and generate."""
