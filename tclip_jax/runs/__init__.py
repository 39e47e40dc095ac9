"""A run on disk: configuration, checkpoints, history and metrics."""
