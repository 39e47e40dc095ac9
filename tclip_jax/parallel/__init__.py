"""The device mesh, and which parameter is sharded over which of its axes."""
