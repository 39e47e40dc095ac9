"""A run on disk: its checkpoints, and which of them are whole."""
